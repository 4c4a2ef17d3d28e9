"""Writing whole files and the generated parts of documents, and where the fixtures lie."""
