from tests import checking
from tests.checking import checked, unchecked  # noqa: F401

pytest_collection_modifyitems = checking.strict(__file__)
