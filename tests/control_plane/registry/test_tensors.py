"""`lightship model import-tensors`: from files that somebody brings to a version a device serves, or a refusal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner, Result
from sqlalchemy import select
from tests.agent import tensored

from lightship.cli import cli
from lightship.home import Home
from lightship.registry import versions
from lightship.storage.models import AuditEvent, ModelVersion, Run
from lightship_agent.contract.bundle import (
    CARD,
    GOLDEN,
    MODEL,
    PROFILE,
    TENSORS,
    Bundle,
    build_bundle,
    read_bundle,
)
from lightship_agent.contract.codes import BundleError, LightshipError
from lightship_agent.contract.wire import encode
from lightship_agent.runtime.golden import check_bundle
from lightship_agent.runtime.model import load_model
from lightship_agent.serving.dataplane import DataPlane
from lightship_agent.serving.tensors import InferRequest, Tensor

SPEC = """
[[inputs]]
name = "image"
datatype = "FP32"
shape = [-1, 3, 8, 8]

[inputs.image]
layout = "NCHW"
resize = "stretch"
scale = 0.00392156862745098
mean = [0.5, 0.5, 0.5]
std = [0.25, 0.25, 0.25]

[[outputs]]
name = "probabilities"
datatype = "FP32"
shape = [-1, 2]

[meaning]
labels = ["blue", "red"]
score_output = "probabilities"
"""

WATCHED_ALONG = SPEC.replace("shape = [-1, 3, 8, 8]", "shape = [-1, 3, 8, 8]\ndirections = 2")


def rebuilt(bundle: Bundle, profile: bytes) -> bytes:
    """The bundle with another profile, and a manifest that vouches for it."""
    assert bundle.tensors is not None
    members = {
        MODEL: bundle.model,
        PROFILE: profile,
        GOLDEN: encode(bundle.golden),
        TENSORS: encode(bundle.tensors),
        CARD: bundle.card.encode(),
    }
    return build_bundle(bundle.manifest, members)


class Desk:
    """A home, and a folder with the three files that are brought."""

    def __init__(self, home: Home, folder: Path) -> None:
        self.home, self.folder = home, folder
        self.write()

    def write(self, *, onnx: bytes | None = None, spec: str = SPEC, **arrays: object) -> None:
        (self.folder / "eye.onnx").write_bytes(tensored.conv_net() if onnx is None else onnx)
        (self.folder / "eye.toml").write_text(spec)
        np.savez(self.folder / "eye.npz", **(tensored.colour_arrays() | arrays))  # type: ignore[arg-type]

    def bring(self) -> Result:
        names = [str(self.folder / name) for name in ("eye.onnx", "eye.toml", "eye.npz")]
        options = ["--model", "eye", "--manifest", names[1], "--golden", names[2], "--json"]
        return CliRunner().invoke(cli, ["--home", str(self.home.path), "model", "import-tensors", names[0], *options])

    def refused(self) -> LightshipError:
        done = self.bring()
        assert isinstance(done.exception, LightshipError), done.output
        return done.exception

    def versions(self) -> list[ModelVersion]:
        with self.home.database.read() as session:
            return list(versions.listed(session))

    def runs(self) -> list[tuple[str, str]]:
        with self.home.database.read() as session:
            return [(run.status, run.error_code) for run in session.scalars(select(Run))]


@pytest.fixture
def desk(fresh_home: Path, tmp_path: Path) -> Iterator[Desk]:
    shutil.copytree(fresh_home, tmp_path / "home")
    home = Home.open(tmp_path / "home")
    yield Desk(home, tmp_path)
    home.close()


@pytest.mark.slow
def test_an_image_model_that_is_brought_is_a_version_whose_bundle_a_device_serves(desk: Desk) -> None:
    done = desk.bring()

    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout[done.stdout.index("{") :])
    assert (said["model"], said["version"], said["state"]) == ("eye", 1, "registered")
    (row,) = desk.versions()
    bundle = read_bundle(desk.home.artifacts.get(row.digest))
    model = load_model(bundle)
    assert check_bundle(model, bundle) < 1e-6
    plane = DataPlane(lambda *_: None)
    plane.install(model)
    pixels = tensored.pixels()
    answer = plane.infer(InferRequest((Tensor("image", "UINT8", pixels.shape, pixels),)))
    assert {t.name: t.data for t in answer.outputs}["label"] == ["red", "blue"] * 3
    assert "8, 8], an image" in bundle.card
    assert "Conv" in bundle.manifest.requires.ops
    assert desk.home.datasets.get(bundle.manifest.provenance.dataset_digest).rows == 6


@pytest.mark.slow
def test_an_input_with_directions_is_watched_along_them_on_the_device(desk: Desk) -> None:
    desk.write(spec=WATCHED_ALONG)

    done = desk.bring()

    assert done.exit_code == 0, done.output
    (row,) = desk.versions()
    bundle = read_bundle(desk.home.artifacts.get(row.digest))
    assert bundle.manifest.input_schema.names[4:] == ("image_norm", "image_pc1", "image_pc2")
    seen: list[np.ndarray] = []
    plane = DataPlane(lambda _model, rows, *_: seen.append(rows))
    plane.install(load_model(bundle))
    pixels = tensored.pixels()
    # Mirrored, an image has the same mean, spread and ends, and another place along the directions.
    for images in (pixels, np.ascontiguousarray(pixels[:, ::-1])):
        plane.infer(InferRequest((Tensor("image", "UINT8", images.shape, images),)))
    stored = desk.home.datasets.get(bundle.manifest.provenance.dataset_digest)
    assert np.allclose(seen[0], stored.x, rtol=1e-5, atol=1e-5)
    assert np.allclose(seen[1][:, :5], stored.x[:, :5], rtol=1e-4)
    assert np.abs(seen[1][:, 6] - stored.x[:, 6]).max() > 0.5


@pytest.mark.slow
def test_a_bundle_whose_projections_are_not_the_declared_ones_is_refused(desk: Desk) -> None:
    desk.write(spec=WATCHED_ALONG)
    assert desk.bring().exit_code == 0
    bundle = read_bundle(desk.home.artifacts.get(desk.versions()[0].digest))
    (good,) = bundle.profile.projections

    other = msgspec.structs.replace(good, input="picture")
    for wrong in ((), (good, good), (other,)):
        profile = encode(msgspec.structs.replace(bundle.profile, projections=wrong))
        with pytest.raises(BundleError, match="projections") as refused:
            read_bundle(rebuilt(bundle, profile))
        assert refused.value.code == "bundle.manifest"


@pytest.mark.slow
@pytest.mark.parametrize(("directions", "code"), [(6, "data.empty"), (0, "data.type"), (33, "data.type")])
def test_directions_that_cannot_be_are_refused_and_nothing_is_kept(desk: Desk, directions: int, code: str) -> None:
    desk.write(spec=WATCHED_ALONG.replace("directions = 2", f"directions = {directions}"))

    assert desk.refused().code == code

    assert (desk.versions(), desk.runs()) == ([], [])


@pytest.mark.slow
def test_the_import_is_a_run_and_is_audited(desk: Desk) -> None:
    assert desk.bring().exit_code == 0

    assert desk.runs() == [("finished", "")]
    with desk.home.database.read() as session:
        verbs = list(session.scalars(select(AuditEvent.verb).order_by(AuditEvent.seq)))
    assert verbs[-4:] == ["run.begin", "model.alias", "model.register", "run.finished"]


@pytest.mark.slow
def test_a_model_that_answers_otherwise_than_its_makers_say_is_refused_and_the_run_says_so(desk: Desk) -> None:
    desk.write(probabilities=tensored.colour_arrays()["probabilities"][:, ::-1].copy())

    error = desk.refused()

    assert error.code == "convert.parity"
    assert "update.golden" in str(error)
    assert desk.runs() == [("refused", "convert.parity")]
    assert desk.versions() == []


@pytest.mark.slow
def test_a_graph_that_is_not_as_declared_is_refused_as_a_device_would(desk: Desk) -> None:
    desk.write(spec=SPEC.replace('name = "probabilities"', 'name = "odds"', 1).replace('"probabilities"', '"odds"'),
               odds=tensored.colour_arrays()["probabilities"])  # fmt: skip

    error = desk.refused()

    assert error.code == "convert.failed"
    assert "'odds'" in str(error)
    assert desk.versions() == []


@pytest.mark.parametrize(
    ("was", "is_", "code"),
    [
        ("[[inputs]]", "[[inputs", "data.unreadable"),
        ('datatype = "FP32"', 'datatype = "FP31"', "data.type"),
        ('layout = "NCHW"', 'layout = "NHCW"', "data.unreadable"),
        ("shape = [-1, 3, 8, 8]", "shape = [1, 3, 8, 8]", "data.type"),
        ("[meaning]", "[means]", "data.unreadable"),
        ('score_output = "probabilities"', 'score_output = "odds"', "data.type"),
        ('labels = ["blue", "red"]', "", "data.type"),
        ('name = "image"', 'name = "picture"', "data.column-missing"),
        ("shape = [-1, 2]", "shape = [-1, 3]", "data.type"),
        ('labels = ["blue", "red"]', 'labels = ["red"]', "data.type"),
    ],
)
def test_a_declaration_that_does_not_fit_is_refused_and_nothing_is_kept(
    desk: Desk, was: str, is_: str, code: str
) -> None:
    assert was in SPEC
    desk.write(spec=SPEC.replace(was, is_))

    assert desk.refused().code == code
    assert (desk.runs(), desk.versions()) == ([], [])


@pytest.mark.parametrize(
    ("arrays", "code"),
    [
        ({"image": np.zeros((6, 3, 8, 8))}, "data.type"),
        ({"image": np.zeros((5, 3, 8, 8), dtype=np.float32)}, "data.type"),
        ({"image": np.full((6, 3, 8, 8), np.nan, dtype=np.float32)}, "data.range"),
        ({"image": np.zeros((6, 3, 8, 9), dtype=np.float32)}, "data.type"),
        ({"image": np.array([{}], dtype=object)}, "data.unreadable"),
    ],
)
def test_golden_arrays_that_do_not_fit_are_refused_and_nothing_is_kept(
    desk: Desk, arrays: dict[str, object], code: str
) -> None:
    desk.write(**arrays)

    assert desk.refused().code == code
    assert (desk.runs(), desk.versions()) == ([], [])


def test_what_is_no_model_or_no_arrays_is_refused_and_nothing_is_kept(desk: Desk) -> None:
    desk.write(onnx=b"PK")
    no_model = desk.refused()
    desk.write()
    (desk.folder / "eye.npz").write_bytes(b"PK")
    no_arrays = desk.refused()

    assert (no_model.code, no_arrays.code) == ("convert.invalid-onnx", "data.unreadable")
    assert (desk.runs(), desk.versions()) == ([], [])
