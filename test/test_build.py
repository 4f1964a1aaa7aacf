"""`matchanything build` with TensorRT-RTX, ahead of time: no GPU is needed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from tiny_bundle import LARGEST, SIZE, SMALLEST, write_bundle

import matchanything_ros
from matchanything_ros import cli
from matchanything_ros.bundle import BUNDLES, load_bundle, sha256_of
from matchanything_ros.engines.buildlog import ADVICE
from matchanything_ros.engines.plan import find_plans, read_manifest
from matchanything_ros.errors import UserError

rtx = pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed")
import matchanything_tools  # noqa: E402
from matchanything_tools.build import build_engine, make_plan  # noqa: E402

pytestmark = pytest.mark.tensorrt


def test_command_writes_plan_and_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = write_bundle(tmp_path, dynamic=True)
    words = [
        "build",
        str(bundle.onnx),
        "--target",
        "sm_86",
        "sm_89",
        "--min",
        "32x32",
        "--opt",
        "48x64",
        "--max",
        "64x64",
    ]
    assert cli.main(words) == 0
    (plan,) = find_plans(bundle)
    assert plan.name == "tiny.sm_86-sm_89-rtx.plan"
    made = read_manifest(plan)
    assert (made.onnx_sha256, made.plan_sha256) == (sha256_of(bundle.onnx), sha256_of(plan))
    assert made.size == plan.stat().st_size > 1000
    assert (made.flavour, made.version) == ("tensorrt_rtx", rtx.__version__)
    assert made.compute_capabilities == ("8.6", "8.9") and made.gpu is None and made.parity is None
    assert made.profile["image1"] == ((32, 32), (48, 64), (64, 64))
    assert made.build_seconds > 0 and made.device_memory is not None
    assert "--target sm_86 sm_89" in made.command and "--max 64x64" in made.command
    told = capsys.readouterr().out
    assert re.search(r"took +\d+\.\d s", told) and "MiB on the device" in told and "not checked" in told
    assert sorted(p.name for p in tmp_path.glob(".*.tmp")) == []


def test_fixed_and_dynamic_profiles(tmp_path: Path) -> None:
    fixed = build_engine(write_bundle(tmp_path / "fixed"), target="sm_86")
    assert fixed.profile["image0"] == (SIZE, SIZE, SIZE) and memoryview(fixed.data).nbytes > 1000
    dynamic = build_engine(write_bundle(tmp_path / "dynamic", dynamic=True), target="sm_86")
    assert dynamic.profile["image0"] == (SMALLEST, SIZE, LARGEST)


@pytest.mark.parametrize("operator", ["NonZero", "Det", "FusedThing"])
def test_parser_error_names_node_operator_and_remedy(tmp_path: Path, operator: str) -> None:
    bundle = write_bundle(tmp_path, operator=operator)
    with pytest.raises(UserError) as error:
        make_plan(bundle, targets=("sm_86",))
    sentence = str(error.value)
    assert f"'/bad/{operator}'" in sentence and f"operator {operator}" in sentence and bundle.onnx.name in sentence
    assert ADVICE.get(operator, "export the bundle again") in sentence
    assert "\n" not in sentence and len(sentence) < 500
    assert find_plans(bundle) == [] and list(tmp_path.glob("tiny*.plan*")) == []


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["--target", "sm_87"],
            r"does not build for 'sm_87': it knows .*sm_86.*build with TensorRT on the machine itself",
        ),
        ([], r"no GPU here to build for.*--target sm_86"),
        (["--target", "sm_86", "--max", "50x64"], r"multiples of 16"),
        (["--target", "sm_86", "--max", "512x640"], r"between 32x32 and 96x128"),
        (["--target", "sm_86", "--min", "64x64"], r"min <= opt <= max"),
        (["--target", "sm_86", "--max", "48x48"], r"--max 48x48 is below 48x64, the size that images are brought to"),
    ],
)
def test_impossible_wishes_are_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str], sentence: str
) -> None:
    monkeypatch.setattr("matchanything_tools.make_plan.current_device", lambda: None)
    bundle = write_bundle(tmp_path, dynamic=True)
    assert cli.main(["build", str(bundle.onnx), *words]) == 1
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1 and re.search(sentence, told[0])


def test_a_truncated_network_is_one_sentence(tmp_path: Path) -> None:
    onnx = write_bundle(tmp_path).onnx
    onnx.with_suffix(".json").unlink()
    onnx.write_bytes(onnx.read_bytes()[:200])
    with pytest.raises(UserError, match=r"TensorRT cannot read .*tiny\.onnx"):
        build_engine(onnx, target="sm_86")


# A build that is slow at a known point: the plan is built and written under its temporary name, and not yet renamed.
SLOW = textwrap.dedent(
    """
    import sys, time
    import matchanything_tools.make_plan as module
    write = module._write
    def slow(*arguments):
        result = write(*arguments)
        print("written", flush=True)
        time.sleep(float(sys.argv[2]))
        return result
    module._write = slow
    from matchanything_ros.bundle import load_bundle
    plan, made = module.make_plan(load_bundle(sys.argv[1]), targets=("sm_86",))
    print(made.plan_sha256, flush=True)
    """
)


def _environment(folder: Path) -> dict[str, str]:
    """For a child: the two packages importable under their names, wherever this test imports them from."""
    links = folder / "links"
    links.mkdir(exist_ok=True)
    for module in (matchanything_ros, matchanything_tools):
        if not (links / module.__name__).exists():
            (links / module.__name__).symlink_to(Path(module.__file__ or "").parent)
    return {**os.environ, "PYTHONPATH": str(links)}


def _slow_build(onnx: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SLOW, str(onnx), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=_environment(onnx.parent))


def test_a_killed_build_leaves_nothing_and_the_next_one_works(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path)
    process = _slow_build(bundle.onnx, 60)
    assert process.stdout is not None and process.stdout.readline() == "written\n"
    assert len(list(tmp_path.glob(".*.tmp"))) == 1, "the plan is there under a temporary name"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert find_plans(bundle) == [] and list(tmp_path.glob("tiny.*plan*")) == []
    plan, made = make_plan(bundle, targets=("sm_86",))
    assert sha256_of(plan) == made.plan_sha256
    assert list(tmp_path.glob(".*.tmp")) == [], "what the killed build left is gone"


def test_two_builds_at_once_make_one_plan(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path)
    first = _slow_build(bundle.onnx, 1.5)
    assert first.stdout is not None and first.stdout.readline() == "written\n"
    start = time.monotonic()
    told: list[str] = []
    plan, made = make_plan(bundle, targets=("sm_86",), say=told.append)
    waited = time.monotonic() - start
    assert first.wait() == 0 and first.stdout.readline().strip() == made.plan_sha256 == sha256_of(plan)
    assert waited > 0.5 and "waiting" in told[0] and "another process has built this plan" in told[1]


def test_no_torch_and_no_onnx_are_imported(tmp_path: Path) -> None:
    """A robot builds its own plans and has neither."""
    code = "import sys, matchanything_tools.build as b; print([m for m in ('torch', 'onnx') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], env=_environment(tmp_path), capture_output=True, text=True)
    assert out.stdout == "[]\n", out.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_build_is_one_sentence_and_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    bundle = write_bundle(tmp_path)
    before = signal.getsignal(number)
    sent: list[str] = []

    def interrupt(phase: str, step: int, steps: int) -> None:
        if not sent:
            sent.append(phase)
            os.kill(os.getpid(), number)
            time.sleep(0.5)  # the main thread sees the signal, TensorRT goes on

    with pytest.raises(UserError, match="interrupted; nothing was written"):
        make_plan(bundle, targets=("sm_86",), progress=interrupt)
    assert sent and signal.getsignal(number) is before
    assert list(tmp_path.glob("tiny*.plan*")) == [] and list(tmp_path.glob(".*.tmp")) == []


@pytest.mark.parametrize("file", sorted(BUNDLES.glob("*.onnx")), ids=lambda file: file.stem)
def test_packaged_bundles_build(file: Path) -> None:
    bundle = load_bundle(file)
    profile = {spec.name: (spec.opt, spec.opt, spec.opt) for spec in bundle.manifest.inputs}
    built = build_engine(bundle, target="sm_86", profile=profile)
    assert memoryview(built.data).nbytes > 100_000 and built.profile == profile
