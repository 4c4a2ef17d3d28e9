"""Released packages as witnesses of a dialect: fetched without dependencies, one module of each imported as it is.

Several of them are large, or want another Python, for a few hundred lines of which a witness needs. `fetch` unpacks
their wheels, one folder a version, so that two versions of one package stand side by side; `loading` imports a module
from there.
"""
