"""Reading JSON from outside, writing whole files and the generated parts of documents, and where the fixtures lie."""
