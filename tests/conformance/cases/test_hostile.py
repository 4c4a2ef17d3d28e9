"""Case files, manifests and dialects that are nearly right are read, or refused in one line that names the file."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from typing import Any

import pytest
from click.testing import CliRunner

from conformance.cases import corpus, dialects
from conformance.cases.case import CaseError, load_case
from conformance.cases.dialects import DialectError
from conformance.cli import main
from conformance.cli.app import app
from conformance.files.places import fixtures
from tests.conformance.files.mutations import mutations, refused

GOLDEN = fixtures() / "golden"
TABLE = json.loads((fixtures() / "dialects.json").read_text())["dialects"]
NAMES = ("smoke-paper-2", "smoke-deepseek-v4.1", "smoke-mhc-lite-2")
CLI = CliRunner()
VARIANT = {"name": "float32-float32", "x": "float32", "weights": "float32", "contract": "activation"}


def parts(name: str) -> tuple[dict[str, Any], bytes]:
    """Header and data of a case file."""
    raw = (GOLDEN / f"{name}.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def written(path, header: bytes, data: bytes):
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def described(path, text: bytes, name: str = NAMES[0]):
    """The case with another description."""
    header, data = parts(name)
    header["__metadata__"]["case"] = text.decode(errors="replace")
    return written(path, json.dumps(header).encode(), data)


def used(path) -> None:
    """Everything that a run asks a case for."""
    case = load_case(path)
    for item in case.items():
        assert item.config and item.inputs() is not None and item.cotangents() is not None
        assert all(name in item.bounds for name in item.expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_description_that_is_nearly_right(tmp_path, name):
    path = tmp_path / "case.safetensors"
    description = json.loads(parts(name)[0]["__metadata__"]["case"])
    texts = mutations(description, 150, seed=1)
    assert sum(refused(lambda t=text: used(described(path, t, name)), CaseError, str(path)) for text in texts) > 100


@pytest.mark.parametrize("name", NAMES)
def test_a_header_that_is_nearly_right(tmp_path, name):
    path, (header, data) = tmp_path / "case.safetensors", parts(name)
    count = sum(
        refused(lambda t=text: used(written(path, t, data)), CaseError, str(path))
        for text in mutations(header, 150, seed=2)
    )
    assert count > 100


DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I8", "BOOL", "F8_E4M3", "F8_E5M2", "U64", "C64", "F4")


def test_tensors_of_other_shapes_dtypes_names_and_values(tmp_path):
    random_, path, count = random.Random(3), tmp_path / "case.safetensors", 0
    for _ in range(200):
        header, data = parts(random_.choice(NAMES))
        name = random_.choice([key for key in header if key != "__metadata__"])
        entry, how = header[name], random_.randrange(5)
        if how == 0:
            entry["dtype"] = random_.choice(DTYPES)
        elif how == 1:
            shape = entry["shape"]
            entry["shape"] = random_.choice([shape[::-1], [], [*shape, 1], [1, *shape], [1] * 40, [0, 2**62]])
        elif how == 2:
            header[random_.choice(["a\nb", "expected/x/y", "magnitude/pre", "gradient", ""])] = header.pop(name)
        elif how == 3:
            header[f"{name}x"] = dict(entry)
        else:
            start, end = entry["data_offsets"]
            data = data[:start] + b"\xff" * (end - start) + data[end:]
        written(path, json.dumps(header).encode(), data)
        count += refused(lambda: used(path), CaseError, str(path))
    assert count > 150


def test_a_signalling_nan_is_no_more_than_a_nan(tmp_path):
    header, data = parts(NAMES[0])
    start, _ = header["weight/pre_alpha"]["data_offsets"]
    data = data[:start] + bytes.fromhex("0100807f") + data[start + 4 :]
    with pytest.raises(CaseError, match="weight/pre_alpha must be finite"):
        used(written(tmp_path / "case.safetensors", json.dumps(header).encode(), data))


@pytest.mark.parametrize(
    "tensor, shape, said",
    [
        ("expected/residual_matrix/H", [2, 1, 2, 2], r"must have \[batch, seq\] = \[1, 2\] before \[2, 2\]"),
        ("input/logits", [2, 2, 2], r"input/logits must have \[batch, seq\] = .* before \[2, 2\], got \[2, 2, 2\]"),
        ("input/branch_scale", [1, 2], r"input/branch_scale must have shape \[2\], got \[1, 2\]"),
    ],
)
def test_shapes_are_held_to_batch_and_seq(tmp_path, tensor, shape, said):
    header, data = parts("smoke-paper-2")
    whole = {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    assert whole["input/logits"] == [1, 2, 2, 2] and whole["input/x"][:2] == [1, 2]
    for name in header:
        if tensor in (name, name.replace("cotangent", "expected")):
            header[name]["shape"] = shape
    with pytest.raises(CaseError, match=said):
        used(written(tmp_path / "case.safetensors", json.dumps(header).encode(), data))


@pytest.mark.parametrize(
    "change, said",
    [
        ({"bounds": {"pry": {}}}, "bounds: unknown stage 'pry', expected one of"),
        ({"quick": "yes"}, "quick: expected true or false, got 'yes'"),
        ({"id": ""}, "id: expected a text that isn't empty"),
        ({"overrides": {"eps": []}}, "overrides.eps: expected .* got an empty list"),
    ],
)
def test_the_place_in_a_description_is_named(tmp_path, change, said):
    description = json.loads(parts(NAMES[0])[0]["__metadata__"]["case"])
    with pytest.raises(CaseError, match=said):
        used(described(tmp_path / "case.safetensors", json.dumps({**description, **change}).encode()))


def of_stage(description: dict[str, Any], stage: str, **changes: Any) -> dict[str, Any]:
    stages = {**description["stages"], stage: {**description["stages"][stage], **changes}}
    return {**description, "stages": stages}


@pytest.mark.parametrize(
    "stage, options, said",
    [
        ("layer", {}, "stages.layer.options.branch: unknown value null, expected one of attention"),
        ("layer", {"branch": "mlp"}, "stages.layer.options.branch: unknown value 'mlp'"),
        ("stack", {"layers": True, "reduce": "sum"}, "stages.stack.options.layers: expected an integer of at least 1"),
        ("stack", {"layers": 1, "reduce": "head"}, "stages.stack.options.reduce: unknown value 'head'"),
    ],
)
def test_the_options_of_a_stage_are_checked(tmp_path, stage, options, said):
    name = "depth-1-paper-2" if stage == "stack" else NAMES[0]
    name = name if (GOLDEN / f"{name}.safetensors").is_file() else next(iter(with_stage(stage)))
    description = json.loads(parts(name)[0]["__metadata__"]["case"])
    text = json.dumps(of_stage(description, stage, options=options)).encode()
    with pytest.raises(CaseError, match=said):
        used(described(tmp_path / "case.safetensors", text, name))


def with_stage(stage: str):
    return (case.id for case in corpus.load_corpus() if stage in case.stages)


def test_a_value_beyond_a_variants_dtype_is_not_exact_in_it(tmp_path):
    header, data = parts(NAMES[0])
    start, _ = header["weight/pre_alpha"]["data_offsets"]
    data = data[:start] + bytes.fromhex("ffff7f7f") + data[start + 4 :]  # the largest float32
    path = written(tmp_path / "case.safetensors", json.dumps(header).encode(), data)
    narrow = {**VARIANT, "name": "float16-float16", "x": "float16", "weights": "float16"}
    description = json.loads(header["__metadata__"]["case"])
    bounds = {stage: {narrow["name"]: next(iter(rows.values()))} for stage, rows in description["bounds"].items()}
    description |= {"variants": [{**narrow, "stages": ["pre"]}], "bounds": bounds}
    header["__metadata__"]["case"] = json.dumps(description)
    written(path, json.dumps(header).encode(), data)
    with pytest.raises(CaseError, match="weight/pre_alpha must be exact in float16"):
        used(path)


def test_a_variant_that_is_given_twice_is_refused(tmp_path):
    description = json.loads(parts(NAMES[0])[0]["__metadata__"]["case"])
    description["variants"].append(description["variants"][0])
    with pytest.raises(CaseError, match=r"variants\[\d\].name: 'float32-float32' is given twice"):
        used(described(tmp_path / "case.safetensors", json.dumps(description).encode()))


def test_keys_that_are_not_known_are_ignored(tmp_path):
    """fixtures/README.md, 12: a later edition may say more."""
    description = json.loads(parts(NAMES[0])[0]["__metadata__"]["case"])
    description |= {"since": {"version": [1]}}
    for part in (*description["stages"].values(), *description["variants"]):
        part["since"] = 2
    used(described(tmp_path / "case.safetensors", json.dumps(description).encode()))


@pytest.fixture
def small(tmp_path):
    """Two cases and their manifest."""
    folder, files = tmp_path / "golden", {}
    folder.mkdir()
    for name in ("smoke-paper-2.safetensors", "smoke-liger.safetensors"):
        shutil.copy(GOLDEN / name, folder)
        content = (folder / name).read_bytes()
        files[name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    return folder, {"format": corpus.MANIFEST_FORMAT, "count": 2, "files": files}


def test_a_manifest_that_is_nearly_right(small):
    folder, manifest = small
    path, count = folder / "MANIFEST.json", 0
    for text in mutations(manifest, 150, seed=4):
        path.write_bytes(text)
        count += refused(lambda: corpus.verify(folder), CaseError, str(folder))
        refused(lambda: corpus.load_corpus(folder), CaseError, str(folder))
    assert count > 100


@pytest.mark.parametrize("name", ["", "..", "../x.safetensors", "a/b", "a\0b", "x" * 256])
def test_a_manifest_names_files_of_its_folder_alone(small, name):
    folder, manifest = small
    manifest["files"][name] = manifest["files"].pop("smoke-liger.safetensors")
    (folder / "MANIFEST.json").write_text(json.dumps(manifest))
    with pytest.raises(CaseError, match=r"MANIFEST\.json: files: expected names of files in its folder, got"):
        corpus.verify(folder)


def test_a_promised_file_that_cannot_be_read_is_named(small):
    folder, manifest = small
    (folder / "MANIFEST.json").write_text(json.dumps(manifest))
    (folder / "smoke-liger.safetensors").unlink()
    (folder / "smoke-liger.safetensors").mkdir()
    assert corpus.verify(folder) == ["altered  smoke-liger.safetensors: it can't be read (Is a directory)"]


def test_a_row_of_ones_own_that_is_nearly_right(tmp_path):
    path, count = tmp_path / "mine.json", 0
    row = dialects.dialect_rows()["deepseek-v4"]
    for seed, content in enumerate((row, {"parameters": row}, TABLE["paper"])):
        for text in mutations(content, 80, seed=seed):
            path.write_bytes(text)
            count += refused(lambda: dialects.read(path), DialectError, str(path))
    assert count > 150


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """Fixtures whose table of dialects is to be written; the package's own ones afterwards."""
    shutil.copy(fixtures() / "dialects.schema.json", tmp_path)
    caches = (dialects._published, dialects._rows)
    monkeypatch.setattr(dialects, "fixtures", lambda: tmp_path)

    def clear():
        for cache in caches:
            cache.cache_clear()

    yield tmp_path / "dialects.json", clear
    clear()


def test_a_table_of_dialects_that_is_nearly_right(broken):
    path, clear = broken

    def ask() -> None:
        for name in dialects.dialect_names():
            assert dialects.edition(name) is not None and dialects.evidence(name) is not None
            assert dialects.configuration(name) and dialects.published(name).overrides == {}

    count = 0
    for text in mutations({"dialects": {name: TABLE[name] for name in ("paper", "deepseek-v4")}}, 150, seed=5):
        path.write_bytes(text)
        clear()
        count += refused(ask, DialectError, str(path))
    assert count > 90


def test_a_command_says_that_the_packages_own_table_is_broken(broken, monkeypatch, capsys):
    path, clear = broken
    path.write_text("{")
    clear()
    monkeypatch.setattr("sys.argv", ["mhc-conformance", "identify", "--impl", "numpy:nothing"])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1 and f"{path}: expected a table of dialects" in said


def command(*arguments: str) -> str:
    """The one line that a command says before it ends with status 2."""
    done = CLI.invoke(app, list(arguments))
    assert done.exit_code == 2 and isinstance(done.exception, SystemExit), (done.output, done.exception)
    assert done.output.count("\n") == 1, done.output
    return done.output


def test_run_refuses_a_broken_case_in_one_line(tmp_path):
    path = tmp_path / "case.safetensors"
    description = json.loads(parts(NAMES[0])[0]["__metadata__"]["case"])
    for text in (b"", b"[" * 9999, json.dumps(of_stage(description, "layer", inputs=["x", 3])).encode()):
        described(path, text)
        assert str(path) in command("run", "--case", str(path))
    assert "stages.layer.inputs[1]: expected a text, got 3" in command("run", "--case", str(path))
    path.unlink()
    assert "no such file" in command("run", "--case", str(path))
    path.mkdir()
    assert str(path) in command("run", "--case", str(path))


def test_run_refuses_a_broken_row_in_one_line(tmp_path):
    path = tmp_path / "mine.json"
    for text in mutations(dialects.dialect_rows()["paper"], 12, seed=6):
        path.write_bytes(text)
        if refused(lambda: dialects.read(path), DialectError):
            assert str(path) in command("run", "--dialect", str(path), "--list")


def test_verify_refuses_a_broken_manifest_in_one_line(small, monkeypatch):
    folder, manifest = small
    monkeypatch.setattr(corpus, "fixtures", lambda: folder.parent)
    for text in mutations(manifest, 12, seed=7):
        (folder / "MANIFEST.json").write_bytes(text)
        if refused(lambda: corpus.manifest(folder), CaseError):
            assert str(folder) in command("fixtures", "verify")
