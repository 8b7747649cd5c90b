"""Images: preprocessing, bad files, batches, augmentation, and training from the command line."""

import json
import os
import shlex
import shutil
import signal
import struct
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.commands import command_raises
from helpers.errors import raises
from PIL import Image
from safetensors import safe_open

import adapters_jax as aj
from adapters_jax.errors import BaseFileError, MissingPackageError
from adapters_jax.finetune.cli.main import main
from adapters_jax.finetune.cli.predict import Predict
from adapters_jax.finetune.data.pixels import (
    ImageBatches,
    ImageRow,
    Preprocessing,
    checked,
    read_image,
)
from adapters_jax.finetune.data.readers import DataError
from adapters_jax.finetune.inference import load_predictor
from adapters_jax.finetune.models.encoder.model import ImageEncoder
from adapters_jax.finetune.options.parsing import parse
from adapters_jax.finetune.pretrained.encoder import load_encoder
from adapters_jax.finetune.run_directory import Run, RunError
from adapters_jax.finetune.runs.stopping import InterruptedRunError
from adapters_jax.finetune.serving.labels import EncoderBase
from adapters_jax.finetune.tasks import TASKS, image_classification
from adapters_jax.finetune.tasks.image_classification import ImageClasses
from adapters_jax.finetune.tasks.labelled_problem import LabelledProblem

FIXTURES = Path(__file__).parent / "fixtures"
PROCESSOR = {"size": {"height": 12, "width": 12}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
TRAIN = "finetune --model tiny --train digits --name run --epochs 4 --learning-rate 0.02"
TRAIN += " --evaluations 1 --checkpoint-every 1000 --batch-size 16"


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write_vit(directory, name="vit"):
    """A tiny random checkpoint of transformers', with a preprocessing."""
    shutil.copytree(FIXTURES / name, directory)
    (directory / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return directory


def write_digits(directory, count=60):
    """scikit-learn's images of 0 and 1, a folder for each."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    for label, name in enumerate(("zero", "one")):
        (directory / name).mkdir(parents=True)
        for i in np.flatnonzero(digits.target == label)[: count // 2]:
            pixels = (digits.images[i] * 15.9).astype(np.uint8)
            Image.fromarray(pixels).save(directory / name / f"{i}.png")
    return directory


def write_image(name, mode="RGB", color=None, **options):
    color = (255, 0, 0) if color is None else color
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (4, 2), color).save(name, **options)
    return name


@pytest.mark.witness("lora")
@pytest.mark.weekly
@pytest.mark.parametrize("method", ["lora", "houlsby"])
def test_it_trains_predicts_and_comes_back_from_its_files(method, capsys):
    write_vit(Path("tiny"))
    write_digits(Path("digits"))
    own = " --layer-norms=" if method == "houlsby" else ""
    assert main(f"{TRAIN} --method {method}{own}".split()) == 0
    run = Run(Path("runs/run"))
    config = run.read_config()
    assert config["task_type"] == "image-classification" and config["pooling"] == "cls"
    constant, _, ours = config["summary"]["results"]
    assert ours["test"]["accuracy"] > max(0.8, constant["test"]["accuracy"])

    capsys.readouterr()
    images = ["digits/zero/0.png", "digits/one/1.png"]
    assert main(["predict", "runs/run", *images, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["image"] for row in rows] == images
    assert [row["label"] for row in rows] == ["zero", "one"]
    Path("digits/some.csv").write_text("image\nzero/0.png\none/1.png\n")
    assert main(["predict", "runs/run", "--file", "digits/some.csv", "--json"]) == 0
    assert [json.loads(line)["label"] for line in capsys.readouterr().out.splitlines()] == [
        "zero",
        "one",
    ]
    Path("alone").mkdir()
    for path in images:
        shutil.copy(path, "alone")
    assert main(["predict", "runs/run", "--file", "alone", "--json"]) == 0
    alone = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["probabilities"] for row in alone] == [row["probabilities"] for row in rows]
    write_image("image.png")
    usage = TASKS["image-classification"].usage("runs/run", config)
    assert main(shlex.split(usage.shell)[1:]) == 0
    exec(usage.python, {})

    trained = aj.read_adapter(run.adapter)[1]
    assert main(["push", "runs/run", "me/native", "--dry-run"]) == 0
    (found,) = load_predictor("native", model="tiny").predict([(images[0], None)])
    assert found.probabilities == pytest.approx(rows[0]["probabilities"], abs=1e-6)
    for to in ("adapterhub", *(("peft",) if method == "lora" else ())):
        assert main(["push", "runs/run", f"me/{to}", "--dry-run", "--to", to]) == 0
        assert main(["convert", to, f"{to}-back", "--to", "native", "--model", "tiny"]) == 0
        back = aj.read_adapter(f"{to}-back")[1]
        assert back.keys() == trained.keys()
        for path, tensor in trained.items():
            np.testing.assert_array_equal(back[path], tensor, err_msg=path)
    head = json.loads(Path("adapterhub/head_config.json").read_text())["config"]
    assert head["head_type"] == "image_classification" and head["layers"] == 1


def test_a_prediction_names_the_image():
    (found,) = ImageClasses(("no", "yes")).predictions([("a.png", None)], np.array([[0.0, 0.0]]))
    shares = {"no": 0.5, "yes": 0.5}
    assert found.to_dict() == {"image": "a.png", "label": "no", "probabilities": shares}


@pytest.mark.slow
def test_a_merged_run_is_a_classifier_of_transformers():
    write_vit(Path("tiny"))
    write_digits(Path("digits"), 40)
    assert main(f"{TRAIN} --method lora --no-baselines".split()) == 0
    assert main(["merge", "runs/run", "--out", "merged"]) == 0
    config = json.loads(Path("merged/config.json").read_text())
    assert config["architectures"] == ["ViTForImageClassification"]
    assert config["id2label"] == {"0": "one", "1": "zero"}
    assert Path("merged/preprocessor_config.json").exists()
    ours, encoder = load_predictor("runs/run"), load_encoder("merged")
    pixels = np.random.default_rng(0).normal(size=(2, 12, 12, 3)).astype(np.float32)
    expected = ours.model.apply({"params": ours.params}, pixels)
    whole = encoder.under(ours.params["head"])
    found = encoder.classifier(2).apply({"params": whole}, pixels)
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("alone", [False, True])
def test_peft_gets_the_head_on_a_whole_clip_but_not_on_its_image_tower_alone(alone):
    tiny = write_vit(Path("tiny"), "clip")
    if alone:
        values = json.loads((tiny / "config.json").read_text())["vision_config"]
        values |= {"model_type": "clip_vision_model", "architectures": ["CLIPVisionModel"]}
        (tiny / "config.json").write_text(json.dumps(values))
    write_digits(Path("digits"), 40)
    assert main(f"{TRAIN} --method lora --no-baselines".split()) == 0
    config = Run(Path("runs/run")).read_config()
    why = "its head: transformers has a classifier of a whole CLIP, not of its image tower alone"
    assert config["ways_out"]["peft"].startswith(f"yes, without {why}" if alone else "yes")
    assert (why in config["ways_out"]["peft"]) == alone
    assert main(["convert", "runs/run", "out", "--to", "peft"]) == 0
    kind = "AutoModel" if alone else "AutoModelForImageClassification"
    assert f"from transformers import {kind}\n" in Path("out/README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dinov2", "clip"])
def test_other_image_encoders_have_heads_on_what_transformers_reads(name):
    encoder = load_encoder(str(write_vit(Path("tiny"), name)))
    assert encoder.pooling == {"dinov2": "cls and mean", "clip": "mean"}[name]
    pixels = jnp.asarray(np.random.default_rng(0).normal(size=encoder.example.shape), jnp.float32)
    model, params = encoder.bare
    hidden = ImageEncoder(encoder.config).apply({"params": encoder.params}, pixels)
    parts = [hidden[:, 0]] * (name == "dinov2") + [hidden[:, 1:].mean(axis=1)]
    found = model.apply({"params": params}, pixels)
    np.testing.assert_allclose(found, np.concatenate(parts, axis=-1), atol=1e-5)


def test_the_preprocessing_is_that_of_the_formula():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 3, 3)).astype(np.uint8)
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    values = {"do_resize": False, "image_mean": mean, "image_std": std, "rescale_factor": 1 / 100}
    found = Preprocessing.from_dict(values).normalised(pixels)
    expected = (pixels.astype(np.float64) / 100 - mean) / std
    np.testing.assert_allclose(found, expected, atol=1e-5)
    plain = Preprocessing.from_dict({"do_rescale": False, "do_normalize": False, "size": 4})
    np.testing.assert_array_equal(plain.normalised(pixels), pixels)
    assert plain.size == (4, 4)


def test_the_shorter_side_is_resized_and_the_middle_cut_out():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 3)).astype(np.uint8)
    Image.fromarray(pixels).save("wide.png")
    values = {"size": {"shortest_edge": 8}, "do_center_crop": True, "crop_size": 4, "resample": 0}
    found = Preprocessing.from_dict(values).read("wide.png")
    np.testing.assert_array_equal(found, pixels[2:6, 6:10])
    larger = Preprocessing.from_dict({**values, "crop_size": {"height": 10, "width": 8}})
    found = larger.read("wide.png")
    np.testing.assert_array_equal(found[1:9], pixels[:, 4:12])
    assert not found[0].any() and not found[9].any()


def test_a_size_of_one_number_is_the_shorter_side_for_clip():
    """As `preprocessor_config.json` of openai/clip-vit-base-patch32 has it."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 3)).astype(np.uint8)
    Image.fromarray(pixels).save("wide.png")
    values = {"size": 8, "do_center_crop": True, "crop_size": 8, "resample": 0}
    clip = Preprocessing.from_dict({**values, "feature_extractor_type": "CLIPFeatureExtractor"})
    np.testing.assert_array_equal(clip.read("wide.png"), pixels[:, 4:12])
    vit = Preprocessing.from_dict({**values, "feature_extractor_type": "DeiTFeatureExtractor"})
    assert (vit.size, vit.shortest) == ((8, 8), None)


def test_what_a_file_of_clip_does_not_say_is_as_its_processor_does_it():
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    given = {"size": {"shortest_edge": 224}, "do_center_crop": True, "crop_size": 224}
    given |= {"resample": 3, "image_mean": mean, "image_std": std}
    whole = Preprocessing.from_dict(given)
    for kind in ("CLIPImageProcessor", "BitImageProcessor", "CLIPImageProcessorFast"):
        assert Preprocessing.from_dict({"image_processor_type": kind}) == whole
    assert (whole.mean, whole.resample, whole.crop) == (mean, 3, (224, 224))


def test_a_narrow_image_does_not_become_a_large_one():
    Image.new("1", (1, 60_000)).save("thin.png")
    with raises(DataError, "thin.png", 2**24):
        Preprocessing(shortest=224, crop=(224, 224)).read("thin.png")


@pytest.mark.parametrize(
    ("mode", "color", "suffix", "expected"),
    [
        ("L", 100, "png", (100, 100, 100)),
        ("LA", (100, 0), "png", (255, 255, 255)),
        ("1", 1, "png", (255, 255, 255)),
        ("P", 0, "png", (0, 0, 0)),
        ("RGBA", (255, 0, 0, 0), "png", (255, 255, 255)),
        ("RGBA", (255, 0, 0, 255), "png", (255, 0, 0)),
        ("CMYK", (0, 255, 255, 0), "tif", (255, 0, 0)),
        ("I;16", 25_700, "png", (100, 100, 100)),
    ],
)
def test_images_of_any_mode_become_rgb(mode, color, suffix, expected):
    image = read_image(write_image(f"image.{suffix}", mode, color))
    assert image.mode == "RGB" and image.size == (4, 2)
    assert {*image.get_flattened_data()} == {expected}


def test_an_animation_is_its_first_frame_and_a_photo_is_turned():
    frames = [Image.new("RGB", (4, 2), color) for color in ("red", "blue")]
    frames[0].save("moving.gif", save_all=True, append_images=frames[1:])
    assert {*read_image("moving.gif").get_flattened_data()} == {(255, 0, 0)}
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter to the right
    write_image("turned.jpg", exif=exif)
    assert read_image("turned.jpg").size == (2, 4)


def bomb(name, side):
    """A PNG of a few bytes that claims to be large."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"")), chunk(b"IEND", b"")
    Path(name).write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return name


def test_bad_images_are_named():
    Path("text.png").write_text("no image")
    write_image("whole.png")
    write_image("cut.jpg")
    Path("cut.jpg").write_bytes(Path("cut.jpg").read_bytes()[:-20])
    Path("empty.png").write_bytes(b"")
    write_image("float.tif", "F", 0.5)
    for name in ("text.png", "cut.jpg", "empty.png", "absent.png", "float.tif"):
        with raises(DataError, name):
            read_image(name)
    for side in (5_000, 10_000, 20_000):  # Pillow warns of the second, and refuses the third
        with raises(DataError, bomb("bomb.png", side), 2**24 + 32 * os.path.getsize("bomb.png")):
            read_image("bomb.png")
    with raises(DataError, "2 of 3 images", "text.png", "cut.jpg"):
        checked(["text.png", "whole.png", "cut.jpg"], Preprocessing())


@pytest.mark.parametrize(
    ("values", "data"),
    [
        ({"size": "large"}, []),
        ({"size": [224]}, []),
        ({"size": {"shortest_edge": -5}}, [-5]),
        ({"size": {"shortest_edge": 1e400}}, []),
        ({"size": {"height": 0, "width": 4}}, [0]),
        ({"image_mean": [0.5]}, ["image_mean"]),
        ({"image_std": [0.5, 0.5, 0.0]}, ["image_std"]),
        ({"resample": 9}, ["filter"]),
        ({"do_center_crop": True}, ["crop_size"]),
    ],
)
def test_unusable_preprocessing_is_an_error(values, data):
    with raises(aj.UserError, "preprocessor_config.json", *data):
        Preprocessing.from_dict(values)


def test_a_checkpoint_without_a_fitting_preprocessing_is_an_error():
    shutil.copytree(FIXTURES / "vit", "tiny")
    with raises(BaseFileError, "tiny", "preprocessor_config.json"):
        load_encoder("tiny")
    Path("tiny/preprocessor_config.json").write_text(json.dumps({**PROCESSOR, "size": 16}))
    with raises(aj.UserError, (16, 16), (12, 12)):
        load_encoder("tiny")


def test_batches_are_functions_of_the_step_and_every_image_comes_once():
    paths = [write_image(f"{i}.png", color=(i, 0, 0)) for i in range(5)]
    how = Preprocessing(size=(2, 2), scale=1.0, mean=(0.0,) * 3, std=(1.0,) * 3)
    kept, labels = checked(paths, how), np.arange(5)
    batches = ImageBatches(kept, labels, 2, 3, how)
    anew = ImageBatches([ImageRow(path) for path in paths], labels, 2, 3, how)
    seen = []
    for step in range(2 * len(batches)):
        batch, same = batches[step], anew[step]
        for name, array in batch.items():
            np.testing.assert_array_equal(array, same[name])
        real = batch["weight"] > 0
        np.testing.assert_array_equal(batch["pixels"][:, 0, 0, 0], batch["labels"])
        seen.append(batch["labels"][real].tolist())
    epochs = [[label for step in part for label in step] for part in (seen[:3], seen[3:])]
    assert [sorted(epoch) for epoch in epochs] == [[*range(5)]] * 2 and epochs[0] != epochs[1]
    in_order = [batch["index"].tolist() for batch in ImageBatches(kept, None, 2, None, how)]
    assert in_order == [[0, 1], [2, 3], [4, -1]]


@pytest.mark.slow
def test_augmented_images_are_flips_and_moves_of_the_image():
    pixels = np.random.default_rng(0).normal(size=(16, 8, 8, 3)).astype(np.float32)
    whole = np.pad(pixels, [(0, 0), (1, 1), (1, 1), (0, 0)], mode="reflect")
    moves = [whole[:, a : a + 8, b : b + 8] for a in range(3) for b in range(3)]
    allowed = {
        "flip": [pixels, pixels[:, :, ::-1]],
        "crop": moves,
    }
    for kind, choices in allowed.items():
        classes = ImageClasses(("a", "b"), (kind,))
        found = np.asarray(classes.augmented({"pixels": pixels}, jax.random.key(1))["pixels"])
        same = classes.augmented({"pixels": pixels}, jax.random.key(1))["pixels"]
        np.testing.assert_array_equal(found, same)
        taken = [
            [n for n, choice in enumerate(choices) if np.array_equal(found[i], choice[i])]
            for i in range(len(pixels))
        ]
        assert all(taken) and len({tuple(each) for each in taken}) > 1
    untouched = ImageClasses(("a", "b")).augmented({"pixels": jnp.asarray(pixels)}, None)
    np.testing.assert_array_equal(untouched["pixels"], pixels)


@pytest.mark.slow
def test_rows_and_flags_that_cannot_be_used(monkeypatch, capsys):
    write_vit(Path("tiny"))
    Path("digits").mkdir()
    with command_raises(DataError, "digits", "without images"):
        main(TRAIN.split())
    write_image("digits/alone.png")
    with command_raises(DataError, "digits", "'label'"):
        main(TRAIN.split())
    for i in range(40):
        write_image(f"digits/only/{i}.png")
    with command_raises(DataError, "digits", "'only'", "two classes"):
        main(TRAIN.split())
    for i in range(40):
        write_image(f"digits/other/{i}.png")
    Path("digits/other/7.png").write_text("no image")
    with command_raises(DataError, "1 of", "digits/other/7.png"):
        main(TRAIN.split())
    write_image("digits/other/7.png")
    with command_raises(aj.UserError, "--max-length 5", 10):
        main(f"{TRAIN} --max-length 5".split())
    with command_raises(aj.UserError, "--pooling", "vision"):
        main(f"{TRAIN} --pooling cls".split())
    with command_raises(aj.UserError, "--task classification", "vision"):
        main(f"{TRAIN} --task classification".split())
    with command_raises(aj.UserError, "--augment", "--method"):
        main(f"{TRAIN} --method head-only --augment flip".split())
    monkeypatch.setitem(__import__("sys").modules, "dm_pix", None)
    with command_raises(MissingPackageError, "dm-pix", "[images]"):
        main(f"{TRAIN} --augment flip".split())


def test_an_image_is_not_taken_for_a_text(caplog):
    command = parse(Predict, ["runs/run", write_image("image.png")])
    for name, warnings in (("image-classification", 0), ("classification", 1)):
        caplog.clear()
        command._read(TASKS[name], {"text": "image"})
        assert len(caplog.records) == warnings


def test_images_are_not_served():
    with raises(aj.UserError, "tiny", "images", "adapters-jax predict"):
        EncoderBase(str(write_vit(Path("tiny"))))


@pytest.mark.weekly
@pytest.mark.parametrize("train", ["digits", "digits/table.csv"])
def test_a_run_with_a_relative_path_is_resumed(train, monkeypatch):
    write_vit(Path("tiny"))
    write_digits(Path("digits"))
    rows = [f"{p.relative_to('digits')},{p.parent.name}" for p in Path("digits").glob("*/*.png")]
    Path("digits/table.csv").write_text("\n".join(["image,label", *rows]) + "\n")
    words = TRAIN.replace("--train digits", f"--train {train} --task image-classification")
    words = words.replace("--epochs 4", "--epochs 1").split()
    batch = LabelledProblem.batch

    def stopped(self, step):
        if step == 2:
            raise InterruptedRunError(signal.SIGTERM)
        return batch(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(LabelledProblem, "batch", stopped)
        assert main([*words, "--no-baselines"]) == 143
    image = next(Path("digits/zero").glob("*.png"))
    before = image.read_bytes()
    Image.new("L", (8, 8), 3).save(image)
    with command_raises(RunError, "runs/run", "pixels_sha256"):
        assert main(["finetune", "--resume", "runs/run"]) == 2
    image.write_bytes(before)
    assert main(["finetune", "--resume", "runs/run"]) == 0


@pytest.mark.slow
def test_the_split_of_a_directory_is_the_same_wherever_it_lies():
    write_digits(Path("digits"))
    shutil.copytree("digits", "copies/others")
    task = image_classification.ImageClassification()
    found = [task.load({"train": Path(name)}, {}, ()) for name in ("digits", "copies/others")]
    held_out = [[Path(path).name for path, _ in data.test.texts] for data in found]
    assert held_out[0] == held_out[1]


def test_a_table_names_images_beside_it():
    write_digits(Path("digits"), 40)
    rows = [f"{p.relative_to('digits')},{p.parent.name}" for p in Path("digits").glob("*/*.png")]
    Path("digits/table.csv").write_text("\n".join(["file,kind", *rows]) + "\n")
    task = image_classification.ImageClassification()
    named = {"image": "file", "label": "kind"}
    data = task.load({"train": Path("digits/table.csv")}, named, ())
    assert all(Path(path).is_file() for part in (data.train, data.dev) for path, _ in part.texts)
    assert data.train.label_names == ("one", "zero")
    whole = task.load({"train": Path("digits")}, {}, ())
    assert {*whole.train.texts} | {*whole.dev.texts} | {*whole.test.texts} == {
        *data.train.texts,
        *data.dev.texts,
        *data.test.texts,
    }


def test_positions_of_dinov2_are_interpolated_to_the_images_of_its_preprocessing():
    write_vit(Path("tiny"), "dinov2")
    Path("tiny/preprocessor_config.json").write_text(json.dumps({**PROCESSOR, "size": 16}))
    encoder = load_encoder("tiny")
    assert encoder.config.image_size == 16 and encoder.longest == 17
    with safe_open("tiny/model.safetensors", "numpy") as file:
        stored = file.get_tensor("dinov2.embeddings.position_embeddings")[0]
    # What torch's interpolate(mode="bicubic") makes 4 points of 3 with.
    weights = np.asarray(
        [
            [1.07177734375, -0.07177734375, 0.0],
            [0.3603515625, 0.74951171875, -0.10986328125],
            [-0.10986328125, 0.74951171875, 0.3603515625],
            [0.0, -0.07177734375, 1.07177734375],
        ]
    )
    expected = np.einsum("ih,jw,hwd->ijd", weights, weights, stored[1:].reshape(3, 3, -1))
    found = encoder.params["embeddings"]["position"][0]
    np.testing.assert_allclose(found[0], stored[0])
    np.testing.assert_allclose(found[1:], expected.reshape(16, -1), atol=1e-6)


@pytest.mark.slow
def test_a_merged_dinov2_has_the_positions_that_it_trained_with():
    write_vit(Path("tiny"), "dinov2")
    Path("tiny/preprocessor_config.json").write_text(json.dumps({**PROCESSOR, "size": 16}))
    write_digits(Path("digits"), 40)
    assert main(f"{TRAIN} --method lora --no-baselines".split()) == 0
    assert main(["merge", "runs/run", "--out", "merged"]) == 0
    assert json.loads(Path("merged/config.json").read_text())["image_size"] == 16
    merged, base = (
        load_encoder(name).params["embeddings"]["position"] for name in ("merged", "tiny")
    )
    np.testing.assert_array_equal(merged, base)
