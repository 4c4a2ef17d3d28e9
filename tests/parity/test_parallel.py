"""The two packages are parallel to read: the same files, the same names in the same order, the same argument names."""

from __future__ import annotations

import ast

import pytest

from tests.parity import signatures
from tests.parity.signatures import PACKAGES, ROOT

LAID_OUT = "JAX's functions have whole arrays, which are laid out on devices; a process of PyTorch has its part"
STACKS = "Flax's scan stacks layers along an axis of their parameters; PyTorch has no such stacks"
LEAN = "PyTorch's eager calls have a path with derivatives of its own, which shares its pieces with the plain one"
KERNELS = "JAX's kernels are handed what the plain path computes of the sums"
ONLY = {
    "streams": LEAN,
    "crossing": "a kernel of Triton's projects the streams while it writes them",
    "functional.engine_of": LEAN,
    "functional.check_site": "`crossing` checks the same",
    "functional.residual_matrix": LEAN,
    "projections.packed_gates": LEAN,
    "projections.gates_apart": LEAN,
    "projections.times_norm": LEAN,
    "projections.side_by_side": LEAN,
    "projections.rounding": LEAN,
    "projections.of_weights": LEAN,
    "projections.contract": LEAN,
    "projections.own_gates": KERNELS,
    "projections.kept": "JAX's checkpoints keep values by name",
    "projections.Shards.by_layout": LAID_OUT,
    "projections.Shards.whole": LAID_OUT,
    "residual.start_axis": LEAN,
    "residual.passes": LEAN,
    "residual.permutation_matrices": LEAN,
    "residual.in_dtype": "each operator of an eager call of PyTorch is dispatched, one that does nothing too",
    "residual.without_autocast": "PyTorch's autocast is in force in a whole block of a program",
    "residual.compiled": "an eager call of JAX runs one program for each operation; PyTorch compiles nothing then",
    "mixing": "JAX's derivative of the mixing is slower on a TPU than one of its own",
    "projections.Shards.activation": LAID_OUT,
    "projections.Shards.gates": LAID_OUT,
    "projections.Shards.over_parts": LAID_OUT,
    "projections.Shards.count": LAID_OUT,
    "projections.Shards.add": LAID_OUT,
    "projections.Shards.share": LAID_OUT,
    "projections.local_dim": LAID_OUT,
    "residual.tokens_last": "JAX computes with the tokens last, since a TPU pads the last axis to 128",
    "residual.tokens_first": "JAX computes with the tokens last, since a TPU pads the last axis to 128",
    "modules.Site.parameters": "torch.nn.Module has a method of this name and another meaning",
    "modules.Site.check_prefix": STACKS,
    "modules.Site.shapes": STACKS,
    "modules.Site.assign": "torch.nn.Module copies in place",
    "modules.Site.reset_parameters": "PyTorch makes parameters on the device meta, and fills them later",
    "modules.Site.is_sharded": "a parameter of PyTorch is a DTensor where it is sharded; all arrays of JAX are alike",
    "modules.Site.extra_repr": "torch.nn.Module prints it",
    "modules.ManifoldConstrainedHyperConnections.forward": "a module of Flax has __call__, which is no public name",
    "modules.HyperHead.forward": "a module of Flax has __call__, which is no public name",
    "weights.listed": STACKS,
    "weights.local_part": "a parameter of PyTorch is a DTensor where it is sharded; all arrays of JAX are alike",
}
"""The names that one package has alone, each with the reason."""
APART = {
    "shards": LAID_OUT,
    "sharding": "a mesh in use and whole arrays in JAX; processes, DTensors and FSDP in PyTorch",
}
"""The modules that are the frameworks' own: the names that they share are compared, the others aren't."""
PRECISION = "PyTorch's precision is a setting of the whole process (torch_impl.functional, TF32)"
DRAWN = "a module of Flax is handed its random numbers, a module of PyTorch its device"
ARGUMENTS = {
    "ends.check_carried": ({"shards"}, set(), LAID_OUT),
    "ends.one_hot": ({"shards="}, set(), LAID_OUT),
    "functional.coefficients": ({"precision="}, set(), PRECISION),
    "functional.pre": ({"precision="}, set(), PRECISION),
    "functional.head": ({"precision="}, set(), PRECISION),
    "projections.check_weights": (set(), {"dim"}, LAID_OUT),
    "projections.logits": ({"precision"}, set(), PRECISION),
    "modules.Site.__init__": ({"rngs", "param_dtype", "precision"}, {"device", "dtype"}, DRAWN),
    "modules.ManifoldConstrainedHyperConnections.__init__": (
        {"rngs=", "param_dtype=", "precision="},
        {"device=", "dtype="},
        DRAWN,
    ),
    "modules.HyperHead.__init__": (
        {"rngs=", "param_dtype=", "precision="},
        {"device=", "dtype="},
        DRAWN,
    ),
    "sharding.make_mesh": ({"devices=", "explicit="}, {"device_type="}, APART["sharding"]),
    "sharding.check_divisible": ({"rules"}, {"gates"}, "JAX's logical axes are mapped by rules"),
    "sharding.shard": ({"rules"}, set(), "JAX's logical axes are mapped by rules"),
    "shards.agreed": (set(), {"mesh"}, "JAX knows its processes; PyTorch has groups of them"),
    "weights.load_weights": ({"shardings"}, {"parts="}, LAID_OUT),
    "weights.read_site": ({"shardings"}, {"parts"}, LAID_OUT),
}
"""The arguments that one package's function has alone: jax_impl's, torch_impl's, and the reason."""


def shared_modules() -> list[str]:
    return sorted(set(signatures.modules("jax_impl")) & set(signatures.modules("torch_impl")))


def names(package: str) -> set[str]:
    """Every module, and every public name in the modules that aren't the frameworks' own."""
    return {
        *signatures.modules(package),
        *(f"{m}.{n}" for m in shared_modules() if m not in APART for n in signatures.signatures(package, m)),
    }


def test_the_names_that_one_has_alone_are_listed_with_a_reason():
    assert names("jax_impl") ^ names("torch_impl") == set(ONLY)


@pytest.mark.parametrize("module", shared_modules())
def test_shared_names_stand_in_the_same_order_with_the_same_arguments(module):
    jax, torch = (signatures.signatures(package, module) for package in PACKAGES)
    assert [name for name in jax if name in torch] == [name for name in torch if name in jax]
    for name in [name for name in jax if name in torch]:
        of_jax, of_torch, _ = ARGUMENTS.get(f"{module}.{name}", (set(), set(), ""))
        assert set(jax[name]) - set(torch[name]) == of_jax, name
        assert set(torch[name]) - set(jax[name]) == of_torch, name
        shared = [[argument for argument in arguments if argument in jax[name] and argument in torch[name]]
                  for arguments in (jax[name], torch[name])]  # fmt: skip
        assert shared[0] == shared[1], name


def test_every_difference_in_arguments_that_is_listed_exists():
    for path in ARGUMENTS:
        module, _, name = path.partition(".")
        assert all(name in signatures.signatures(package, module) for package in PACKAGES), path


def test_both_packages_export_the_same_names():
    exported = []
    for package in PACKAGES:
        tree = ast.parse((ROOT / package / "__init__.py").read_text())
        exported += [ast.unparse(node.value) for node in tree.body if isinstance(node, ast.Assign)
                     and ast.unparse(node.targets[0]) == "__all__"]  # fmt: skip
    assert len(exported) == 2 and exported[0] == exported[1]


FUSED = ("fused", "fused.balancing", "fused.mixing", "fused.site", "fused.transforms")
KERNELS_OF_JAX = ("kernels.mixing", "kernels.site")
STANDS_ON = {
    "version": set(),
    "config": set(),
    "mixing": set(),
    "residual": {"config"},
    "projections": {"config", "mixing", "residual"},
    "shards": {"projections"},
    "streams": {"config", "residual"},
    "ends": {"mixing", "projections", "residual", "streams"},
    "functional": {
        "config",
        "ends",
        "mixing",
        "projections",
        "residual",
        "streams",
        "kernels",
        *FUSED,
        *KERNELS_OF_JAX,
    },
    "crossing": {"config", "functional", "projections", "residual", "streams", "fused.crossing", *FUSED},
    "health": {"config", "projections", "residual"},
    "metadata": {"config"},
    "weights": {"config", "functional", "metadata"},
    "modules": {"config", "ends", "functional", "models", "shards", "weights"},  # models inside two methods
    "models": {"metadata", "modules", "shards", "weights"},
    "sharding": {"config", "ends", "functional", "models", "modules", "projections", "shards"},
}
"""The modules of its own package that each may import: sharding stands on modules, those on functional."""


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("module", STANDS_ON)
def test_a_module_imports_only_those_that_it_stands_on(package, module):
    path = ROOT / package / f"{module}.py"
    if not path.exists():
        assert module in ONLY
        return
    tree = ast.parse(path.read_text())
    typed = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    for node in typed:
        tree.body.remove(node)
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == package:
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{package}."):
            imported.add(str(node.module).partition(".")[2])
        if isinstance(node, ast.ImportFrom | ast.Import):
            roots = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            strangers = {"conformance", *PACKAGES} - {package}
            assert not strangers & {root.partition(".")[0] for root in roots}, f"{module} imports {roots}"
    assert imported <= STANDS_ON[module], imported - STANDS_ON[module]
