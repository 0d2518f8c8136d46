"""Bad input at the command line: one line naming the thing and the fix, exit code 2, nothing left
on disk."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from jaxbd.cli.main import main

TINY = ["--num-steps", "60", "--width", "4", "--image-shape", "8", "8", "1"]
FAST = ["--method", "mesa", "--levels", "0.9", "--steps", "2", "--mesa.hidden", "16"]


@pytest.fixture(scope="module")
def victim(tmp_path_factory):
    """A tiny model of 8x8 digits."""
    path = tmp_path_factory.mktemp("bad") / "victim"
    assert main(["attack", "--data", "digits", "--out", str(path), *TINY, "--no-attack"]) == 0
    return path


@pytest.fixture
def refused(tmp_path, capsys):
    """Runs a command that must fail: returns its one line (progress apart); nothing may change
    below `tmp_path`."""

    def run(*command):
        contents = lambda: {p: p.read_bytes() if p.is_file() else None for p in tmp_path.rglob("*")}
        before = contents()
        capsys.readouterr()
        assert main([str(word) for word in command]) == 2
        lines = [
            line
            for line in capsys.readouterr().err.splitlines()
            if not line.startswith(("reading ", "["))
        ]
        assert len(lines) == 1 and lines[0].startswith("jaxbd: "), lines
        assert contents() == before
        return lines[0]

    return run


def images(path, shape=(8, 8, 1), count=64, labels=None):
    """A data set file of noise."""
    rng = np.random.default_rng(0)
    labels = np.arange(count) % 10 if labels is None else labels
    np.savez(
        path,
        images=rng.integers(0, 256, (count, *shape), np.uint8),
        labels=np.asarray(labels, np.int32),
    )
    return path


def test_missing_data_is_named(refused, victim, tmp_path):
    line = refused("scan", victim, "--data", tmp_path / "absent", "--out", tmp_path / "scan.json")
    assert "absent" in line and "does not exist" in line


def test_empty_folder_is_named(refused, victim, tmp_path):
    (tmp_path / "nothing").mkdir()
    assert "nothing is an empty folder" in refused("scan", victim, "--data", tmp_path / "nothing")


def test_images_of_another_size_are_refused(refused, victim, tmp_path):
    line = refused("scan", victim, "--data", images(tmp_path / "d.npz", (12, 12, 1)))
    assert "12x12" in line and "8x8" in line


def test_images_with_other_channels_are_refused(refused, victim, tmp_path):
    assert "3 channel" in refused(
        "evaluate", victim, "--data", images(tmp_path / "d.npz", (8, 8, 3))
    )


def test_labels_outside_the_classes_are_refused(refused, victim, tmp_path):
    line = refused("scan", victim, "--data", images(tmp_path / "d.npz", labels=np.arange(64) % 11))
    assert "label 10" in line and "0..9" in line


@pytest.mark.parametrize("verb", ["scan", "evaluate", "repair", "convert"])
def test_nan_weights_are_named(refused, victim, tmp_path, verb):
    from safetensors.numpy import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(victim, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["params/conv0/kernel"][0, 0, 0, 0] = np.nan
    save_file(tensors, broken / "model.safetensors")
    data = [] if verb == "convert" else ["--data", "digits"]
    out = [] if verb in ("scan", "evaluate") else ["--out", tmp_path / "out"]
    line = refused(verb, broken, *data, *out)
    assert "params/conv0/kernel" in line and "NaN" in line


def test_fewer_images_than_a_batch(refused, victim):
    wide = ["--limit", "40", "--batch-size", "32"]
    line = refused("scan", victim, "--data", "digits", *wide, *FAST)
    assert "40 images" in line and "batch of 32" in line and "--batch-size" in line


def test_fewer_images_than_a_batch_to_train_on(refused, tmp_path):
    line = refused(
        "attack",
        "--data",
        images(tmp_path / "d.npz", count=20),
        "--out",
        tmp_path / "out",
        *TINY[:4],
    )
    assert "15 images" in line and "--batch-size" in line


@pytest.mark.parametrize(
    ("command", "thing"),
    [
        (["scan", "m", "--data", "digits", "--method", "magic"], "'magic'"),
        (["repair", "m", "--data", "digits", "--out", "o", "--method", "magic"], "'magic'"),
        (
            [
                "repair",
                "m",
                "--data",
                "digits",
                "--out",
                "o",
                "--method",
                "bna",
                "--with.correction.divergence",
                "x",
            ],
            "'x'",
        ),
        (["scan", "m", "--data", "digits", "--pairs", "--method", "mesa"], "--pairs"),
        (["scan", "m", "--data", "digits", "--levels", "1.5"], "1.5"),
        (["scan", "m", "--data", "digits", "--levels", "high"], "high"),
        (["scan", "m", "--data", "digits", "--colour", "red"], "--colour"),
        (["scan"], "MODEL"),
        (["heal", "m"], "'heal'"),
        (["repair", "m", "--data", "digits", "--out", "o", "--evidence", "level"], "--level"),
    ],
)
def test_flags_that_make_no_sense(refused, command, thing):
    assert thing in refused(*command)


@pytest.mark.parametrize("verb", ["scan", "evaluate", "attack", "repair", "convert"])
def test_an_output_that_cannot_be_written_is_found_before_any_work(refused, victim, tmp_path, verb):
    (tmp_path / "file").write_text("in the way")
    out = tmp_path / "file" / "below" / "out"
    model = [] if verb == "attack" else [victim]
    data = [] if verb == "convert" else ["--data", tmp_path / "never-looked-at"]
    line = refused(verb, *model, *data, "--out", out)
    assert str(out) in line and "writable" in line


def test_an_output_that_is_a_folder(refused, victim, tmp_path):
    (tmp_path / "scan.json").mkdir()
    assert "is a folder" in refused(
        "scan", victim, "--data", "digits", "--out", tmp_path / "scan.json"
    )


@pytest.mark.parametrize("folder", [True, False])
def test_an_output_that_would_overwrite_something_else(refused, victim, tmp_path, folder):
    precious = tmp_path / "precious"
    if folder:
        precious.mkdir()
    (precious / "data.csv" if folder else precious).write_text("1,2,3")
    assert "precious" in refused("convert", victim, "--out", precious)
    assert "precious" in refused("attack", "--data", "digits", "--out", precious, *TINY)


@pytest.mark.parametrize(
    "command",
    [
        ["attack", "--data", "digits", "--target", "10", *TINY, "--out"],
        ["repair", "MODEL", "--data", "digits", "--target", "10", "--out"],
        [
            "evaluate",
            "MODEL",
            "--data",
            "digits",
            "--trigger",
            "white:2x2",
            "--place",
            "0,0",
            "--target",
            "10",
            "--out",
        ],
    ],
)
def test_a_target_out_of_range(refused, victim, tmp_path, command):
    command = [victim if word == "MODEL" else word for word in command]
    line = refused(*command, tmp_path / ("out.json" if command[0] == "evaluate" else "out"))
    assert "target 10 is out of range" in line and "0..9" in line


def test_scanning_a_class_out_of_range(refused, victim):
    assert "target -2 is out of range" in refused(
        "scan", victim, "--data", "digits", *FAST, "--targets", "-2"
    )


@pytest.mark.parametrize(
    "content", [b"", b"GIF89a" * 40, b"\x80\x04\x95cos\nsystem\n(S'touch owned'\ntR."]
)
@pytest.mark.parametrize("verb", ["scan", "inspect"])
def test_a_file_that_is_no_model(refused, tmp_path, verb, content):
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    line = refused(verb, path, *(["--data", "digits"] if verb == "scan" else []))
    assert "model.pth" in line
    assert not pathlib.Path("owned").exists()


def test_a_folder_that_is_no_model(refused, tmp_path):
    (tmp_path / "model").mkdir()
    assert "model" in refused("scan", tmp_path / "model", "--data", "digits")


def test_a_model_folder_with_an_unknown_architecture(refused, victim, tmp_path):
    shutil.copytree(victim, tmp_path / "odd")
    config = json.loads((tmp_path / "odd" / "config.json").read_text())
    (tmp_path / "odd" / "config.json").write_text(json.dumps({**config, "arch": "transformer"}))
    assert "transformer" in refused("scan", tmp_path / "odd", "--data", "digits")


def test_unknown_architecture_to_train(refused, tmp_path):
    line = refused("attack", "--data", "digits", "--out", tmp_path / "out", "--arch", "transformer")
    assert "'transformer'" in line and "resnet18" in line


def test_images_that_are_not_the_models_get_no_verdict(refused, victim, tmp_path):
    line = refused(
        "scan",
        victim,
        "--data",
        images(tmp_path / "noise.npz", count=300),
        "--out",
        tmp_path / "scan.json",
    )
    assert "this is not the preprocessing (or not the data) of this model" in line


@pytest.mark.parametrize(
    ("flags", "thing"),
    [
        (["absent.png"], "absent.png"),
        (["white:2x2", "--target", "1"], "--place"),
        (["white:2x2", "--place", "0,0"], "--target"),
        (["white:2x2", "--place", "7,0", "--target", "1"], "(6, 6)"),
        (["white:9x2", "--place", "0,0", "--target", "1"], "9x2"),
        (["white:2x2", "--place", "middle", "--target", "1"], "'middle'"),
        (["white:0x2", "--place", "0,0", "--target", "1"], "at least 1"),
    ],
)
def test_triggers_that_cannot_be_applied(refused, victim, flags, thing):
    assert thing in refused("evaluate", victim, "--data", "digits", "--trigger", *flags)


@pytest.mark.parametrize(
    ("arrays", "thing"),
    [
        ({"mask": np.ones((2, 2))}, "'pattern'"),
        ({"pattern": np.full((2, 2, 1), np.nan)}, "not finite"),
        ({"pattern": np.ones((2, 2, 4))}, "[2, 2, 4]"),
        ({"pattern": np.ones((2, 2, 1)), "mask": np.ones((3, 3))}, "mask"),
        ({"pattern": np.array([{}], object)}, "pickled objects"),
        ({"pattern": np.random.default_rng(0).random((2, 2, 3))}, "3 channels"),
    ],
)
def test_trigger_files_that_hold_no_trigger(refused, victim, tmp_path, arrays, thing):
    np.savez(tmp_path / "t.npz", **arrays)
    flags = ["--trigger", tmp_path / "t.npz", "--place", "0,0", "--target", "1"]
    assert thing in refused("evaluate", victim, "--data", "digits", *flags)


@pytest.mark.parametrize("name", ["t.npz", "t.png"])
def test_trigger_files_that_are_damaged(refused, victim, tmp_path, name):
    (tmp_path / name).write_bytes(b"PK\x03\x04 not really")
    flags = ["--trigger", tmp_path / name, "--place", "0,0", "--target", "1"]
    assert name in refused("evaluate", victim, "--data", "digits", *flags)


def test_a_scan_file_that_is_none(refused, victim, tmp_path):
    for content, thing in (
        ("{}", "not the result of a scan"),
        ("nonsense", "JSON"),
        ('{"targets": []}', "no target"),
    ):
        (tmp_path / "scan.json").write_text(content)
        flags = ["--scan", tmp_path / "scan.json", "--out", tmp_path / "out"]
        assert thing in refused("repair", victim, "--data", "digits", *flags)


def test_a_diverging_training_names_what_to_change(refused, tmp_path):
    line = refused(
        "attack", "--data", "digits", "--out", tmp_path / "out", *TINY, "--learning-rate", "1e30"
    )
    assert "finite" in line and "learning rate" in line


def test_normalisation_flags_that_contradict(refused, victim):
    for flags in (
        ["--mean", "0.5"],
        ["--mean", "0.5", "--std", "0"],
        ["--mean", "0", "--std", "1", "--normalisation", "half"],
    ):
        assert "--std" in refused("scan", victim, "--data", "digits", *flags)


@pytest.mark.parametrize("verb", ["scan", "convert"])
@pytest.mark.parametrize("flags", ["nan 1", "0 nan", "0 inf", "inf 1"])
def test_normalisations_that_are_not_finite(refused, tmp_path, verb, flags):
    mean, std = flags.split()
    data = ["--out", tmp_path / "o"] if verb == "convert" else ["--data", "digits"]
    line = refused(verb, "m", *data, "--mean", mean, "--std", std)
    assert "one finite number per channel" in line


def test_a_form_that_a_folder_does_not_have(refused, victim):
    line = refused("evaluate", victim, "--data", "digits", "--form", "stride=2")
    assert "--form stride=2 is not a form of this net" in line


@pytest.mark.parametrize("verb", ["scan", "attack", "convert"])
@pytest.mark.parametrize(
    "shape", ["-1 16 1", "0 0 1", "8 8 0", "8 8 5", "100000 8 1", "4096 4096 3"]
)
def test_image_shapes_that_cannot_be(refused, tmp_path, verb, shape):
    words = {
        "scan": ["m", "--data", "digits"],
        "attack": ["--data", "digits", "--out", tmp_path / "o"],
        "convert": ["m", "--out", tmp_path / "o"],
    }
    line = refused(verb, *words[verb], "--image-shape", *shape.split())
    assert f"--image-shape {shape} is out of range" in line and "1..4096" in line


@pytest.mark.parametrize("name", ["vic.pth", "vic.json"])
def test_attack_writes_no_file(refused, tmp_path, name):
    line = refused("attack", "--data", "digits", "--out", tmp_path / name)
    assert name in line and "a name without an ending" in line


@pytest.mark.parametrize(
    "flags", [["--normalisation", "cifar10"], ["--mean", "0.5", "0.5", "--std", "1", "1"]]
)
def test_a_normalisation_for_other_channels_is_refused(refused, victim, flags):
    assert "does not fit a model with 1" in refused("evaluate", victim, "--data", "digits", *flags)


@pytest.mark.parametrize("verb", ["scan", "evaluate"])
def test_a_seed_out_of_range_is_refused(refused, victim, verb):
    assert "--seed" in refused(verb, victim, "--data", "digits", "--seed", "-1")
    assert "--seed" in refused(verb, victim, "--data", "digits", "--seed", str(2**32))


def test_what_describes_a_trigger_needs_one(refused, victim, tmp_path):
    assert "--trigger" in refused("evaluate", victim, "--data", "digits", "--target", "3")
    out = tmp_path / "repaired"
    assert "--trigger" in refused(
        "repair", victim, "--data", "digits", "--out", out, "--place", "0,0"
    )
    given = ["--trigger", "white:2x2", "--target", "3", "--scan", tmp_path / "scan.json"]
    assert "needs no scan" in refused("repair", victim, "--data", "digits", "--out", out, *given)


def test_the_current_folder_is_no_output(refused, victim, tmp_path, monkeypatch):
    (tmp_path / "thesis.txt").write_text("precious")
    monkeypatch.chdir(tmp_path)
    assert "thesis.txt" in refused("repair", victim, "--data", "digits", "--out", ".")


def test_evidence_that_a_method_cannot_give_is_refused_at_once(refused, victim, tmp_path):
    flags = ["--evidence", "entropy", "--search.method", "pixel", "--out", tmp_path / "repaired"]
    assert "models no levels" in refused("repair", victim, "--data", "digits", *flags)


@pytest.mark.parametrize("flag", ["--scan-steps", "--repair-steps", "--train-steps"])
def test_a_demo_of_nothing_is_refused(refused, tmp_path, flag):
    assert "at least 1" in refused("demo", flag, "0", "--out", tmp_path / "demo")


@pytest.fixture(scope="module")
def guarded_victim(victim, tmp_path_factory):
    """The tiny model with a guard for class 3 whose corrected net is the model itself."""
    from jaxbd.detection import guard
    from jaxbd.interop import guarded, load

    path, model = tmp_path_factory.mktemp("bad") / "guarded", load.open_model(victim)
    guarded.save(path, model.spec, guard.pack(model.variables, [model.variables]), [3])
    return path


def test_a_guarded_model_where_a_plain_one_is_wanted(refused, guarded_victim, tmp_path):
    data = ["--data", "digits"]
    assert "is a guarded model" in refused("scan", guarded_victim, *data, *FAST)
    assert "is a guarded model" in refused("scan", guarded_victim, *data, "--method", "pt-red")
    assert "is a guarded model" in refused("repair", guarded_victim, *data, "--out", tmp_path / "o")
    assert "is a folder" in refused("convert", guarded_victim, "--out", tmp_path / "o.pth")


def test_a_plain_model_where_a_guarded_one_is_wanted(refused, victim, tmp_path):
    line = refused("guard", victim, "--data", "digits", "--out", tmp_path / "v.jsonl")
    assert "is not a guarded model" in line and "--method bna" in line


def test_a_guard_that_is_damaged(refused, guarded_victim, tmp_path):
    shutil.copytree(guarded_victim, tmp_path / "g")
    path = tmp_path / "g" / "guard.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    for verb in ("guard", "evaluate"):
        assert "guard.safetensors" in refused(verb, tmp_path / "g", "--data", "digits")
    assert "guard.safetensors" in refused("inspect", tmp_path / "g")


def test_images_that_a_guard_cannot_take(refused, guarded_victim, tmp_path):
    np.savez(tmp_path / "large.npz", images=np.zeros((3, 12, 12, 1), np.uint8))
    assert "12, 12" in refused("guard", guarded_victim, "--data", tmp_path / "large.npz")
    np.savez(tmp_path / "none.npz", images=np.zeros((0, 8, 8, 1), np.uint8))
    assert "none.npz" in refused("guard", guarded_victim, "--data", tmp_path / "none.npz")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "x.png").write_bytes(b"not a picture")
    assert "x.png" in refused("guard", guarded_victim, "--data", tmp_path / "d")
    assert "absent" in refused("guard", guarded_victim, "--data", tmp_path / "absent")


@pytest.mark.parametrize(
    ("flags", "thing"),
    [
        (["--batch-size", "0"], "at least 1"),
        (["--overlays", "5"], "--strip"),
        (["--strip", "digits", "--overlays", "0"], "overlays is 0"),
        (["--strip", "digits", "--false-positive-rate", "1"], "not in (0, 1)"),
        (["--strip", "absent"], "absent"),
    ],
)
def test_guard_flags_that_make_no_sense(refused, guarded_victim, flags, thing):
    assert thing in refused("guard", guarded_victim, "--data", "digits", "--limit", "50", *flags)


def test_a_guarded_model_is_no_single_file(refused, victim, tmp_path):
    flags = [
        "--method",
        "bna",
        "--data",
        "digits",
        "--trigger",
        "white:2x2",
        "--place",
        "0,0",
        "--target",
        "3",
    ]
    assert "is a folder or an ONNX file" in refused(
        "repair", victim, *flags, "--out", tmp_path / "o.pth"
    )


def test_a_correction_of_a_class_without_a_trigger(refused, victim, tmp_path):
    flags = ["--method", "bna", "--data", "digits", "--target", "3", "--out", tmp_path / "o"]
    assert "--trigger" in refused("repair", victim, *flags)


def test_bounds_of_another_model_are_found_before_any_work(refused, victim, tmp_path):
    from jaxbd.interop import load

    model = load.open_model(victim)
    bounds = {"norm0": {side: np.zeros(4, np.float32) for side in ("lower", "upper")}}
    load.save_model(tmp_path / "r.pth", model, {**model.variables, "bounds": bounds})
    line = refused(
        "repair",
        victim,
        "--data",
        tmp_path / "never-looked-at",
        "--out",
        tmp_path / "r.safetensors",
    )
    assert "of another model" in line and "another name" in line


ODD = "a\x1b[31m\x1b]0;title\x07\u202eb\x9b2J\r"
"""What no terminal may see as it is: escapes of C0 and C1, a title, a change of direction."""


@pytest.fixture(scope="module")
def odd_images(tmp_path_factory):
    """Ten class folders with odd names, in a folder with one, of the digits that `victim` knows."""
    from PIL import Image

    from jaxbd.data import digits

    root = tmp_path_factory.mktemp("odd") / f"data{ODD}"
    found = digits.load(8)
    for number, (image, label) in enumerate(zip(found.images[:300], found.labels, strict=False)):
        place = root / f"{ODD}{label}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(image)[..., 0]).save(place / f"{number:03d}.png")
    return root


def check_plain(text: str) -> None:
    """No character that is not printable, line ends apart."""
    odd = {c for c in text if not c.isprintable() and c not in "\n\N{NO-BREAK SPACE}"}
    assert not odd, sorted(map(ascii, odd))


@pytest.mark.parametrize(
    "words, made",
    [
        (["inspect", "{odd}"], []),
        (["inspect", "{odd}", "--json"], []),
        (["convert", "{odd}", "--out", "{out}.pth"], []),
        (["evaluate", "{victim}", "--data", "{data}", "--out", "{out}.json"], [".json"]),
        (["evaluate", "{odd}", "--data", "{data}"], []),
        (
            [
                "scan",
                "{victim}",
                "--data",
                "{data}",
                "--out",
                "{out}.json",
                "--report",
                "{out}.html",
                *FAST,
                "--batch-size",
                "16",
            ],
            [".json", ".html"],
        ),
        (["verify", "{record}"], []),
        (["verify", "{odd}"], []),
        (["repair", "{odd}", "--data", "{data}", "--out", "{out}"], []),
        (["guard", "{victim}", "--data", "{data}"], []),
        (
            [
                "attack",
                "--data",
                "{data}",
                "--out",
                "{out}",
                "--image-shape",
                "8",
                "8",
                "1",
                "--num-steps",
                "2",
                "--width",
                "4",
                "--no-attack",
            ],
            [],
        ),
    ],
)
def test_names_from_files_reach_neither_screen_nor_page(
    victim, odd_images, tmp_path, capsys, words, made
):
    """Whatever becomes of it: what is printed and written is plain text."""
    import sys

    sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
    import hostile

    from jaxbd.interop import manifest

    tensors = hostile.table((hostile.text(f"w{ODD}"), hostile.tensor()))
    (tmp_path / "o").mkdir()
    odd = tmp_path / "o" / f"odd{ODD}.pth"
    body = hostile.table((hostile.text(ODD), tensors), (hostile.text(f"x{ODD}"), hostile.number(1)))
    odd.write_bytes(hostile.archive(hostile.program(body)))
    record = tmp_path / "o" / "record.json"
    stated = {"path": str(odd), "manifest": manifest.statement(ODD, {f"w{ODD}": "0" * 64})}
    record.write_text(json.dumps({"model": stated}))
    out = tmp_path / "out"
    places = dict(victim=victim, odd=odd, data=odd_images, out=out, record=record)
    capsys.readouterr()
    main([word.format(**places) for word in words])
    said = capsys.readouterr()
    check_plain(said.out + said.err)
    if words[0] in ("inspect", "scan", "verify"):
        assert r"\x1b" in said.out + said.err  # they did speak of it
    for ending in made:
        check_plain(out.with_name(out.name + ending).read_text())


def test_a_model_is_not_converted_onto_itself(refused, victim, tmp_path):
    model = shutil.copytree(victim, tmp_path / "m")
    (model / "trigger.npz").write_bytes(b"x")
    (tmp_path / "link").symlink_to("m")
    for out in (model, tmp_path / "link"):
        assert "is also an input" in refused("convert", model, "--out", out)


def test_a_link_is_followed_and_stays(victim, tmp_path):
    shutil.copytree(victim, tmp_path / "target")
    (tmp_path / "target" / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to("target")
    assert main(["convert", str(victim), "--out", str(tmp_path / "link"), "--force"]) == 0
    assert (tmp_path / "link").is_symlink() and not (tmp_path / "target").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "target"]
    weights = [path / "model.safetensors" for path in (victim, tmp_path / "target")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    (tmp_path / "m.pth").touch()
    (tmp_path / "l.pth").symlink_to("m.pth")
    assert main(["convert", str(victim), "--out", str(tmp_path / "l.pth"), "--force"]) == 0
    assert (tmp_path / "l.pth").is_symlink() and (tmp_path / "m.pth").stat().st_size > 1000


def test_bounds_beside_a_model_are_spoken_of_recorded_and_verified(victim, tmp_path, capsys):
    from jaxbd.interop import load

    model, path = load.open_model(victim), tmp_path / "r.pth"
    clipped = {"lower": np.full(4, -1e9, np.float32), "upper": np.full(4, 1e9, np.float32)}
    load.save_model(path, model, {**model.variables, "bounds": {"norm0": clipped}})
    out = tmp_path / "evaluate.json"
    words = ["evaluate", str(path), "--data", "digits", "--image-shape", "8", "8", "1"]
    capsys.readouterr()
    assert main([*words, "--normalisation", "none", "--out", str(out)]) == 0
    assert "r.bounds.safetensors, which lies beside the model" in capsys.readouterr().err
    record = json.loads(out.read_text())["model"]
    named = {each["name"] for each in record["manifest"]["predicate"]["resources"]}
    assert record["bounds"] == "r.bounds.safetensors"
    assert named == {"r.pth", "r.bounds.safetensors"}
    assert main(["verify", str(out)]) == 0
    (tmp_path / "r.bounds.safetensors").unlink()
    assert main(["verify", str(out)]) == 1
    assert "missing" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["pipe", "hollow", "socket"])
def test_model_files_that_hold_nothing_are_refused_at_once(tmp_path, kind):
    import os
    import socket

    path = tmp_path / "m.safetensors"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    else:
        with path.open("wb") as file:
            file.truncate(1 << 32)
    for verb in (["inspect", path], ["convert", path, "--out", tmp_path / "o"]):
        code = main([str(word) for word in verb])
        assert code == 2
