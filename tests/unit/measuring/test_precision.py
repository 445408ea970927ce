"""The precision of a detector whose boxes are known, on images of several sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import onnx_asr
from onnx_asr import PRESETS, DataError, Dataset, DetectorOptions, Fidelity, ModelError, OptionError, Preprocessing
from onnx_asr.measuring.evaluation import Scoring, evaluate_all
from tests.detectors import BOXES, SIDE, SIZES, annotations, detector, placed, write_annotations, write_images
from tests.graphs import net
from tests.scorer import scorer
from tools.paths import ASSETS

pytest.importorskip("pycocotools", reason="pycocotools is not installed")

YOLOV5 = PRESETS["yolov5"]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images")


def scored(
    model: onnx.ModelProto, images: Any, boxes: Any = None, preprocessing: Any = YOLOV5, **options: Any
) -> Fidelity:
    how = {name: options.pop(name) for name in ("decode", "nms_iou", "category_ids") if name in options}
    asked = DetectorOptions(annotations() if boxes is None else boxes, **{"decode": "yolov5", **how})
    return onnx_asr.evaluate(model, images, preprocessing=preprocessing, detector=asked, **options)


def test_boxes_go_back_to_the_pixels_of_every_image(images: Path, tmp_path: Path) -> None:
    found = scored(detector(), images)
    assert found.samples == 3
    assert found.mean_ap == pytest.approx(1.0)
    assert found.mean_ap50 == pytest.approx(1.0)
    assert found.top1 is None
    assert found.snr_db is None
    path = write_annotations(tmp_path / "boxes.json", annotations())
    assert scored(detector(), images, str(path)) == found
    corner = scored(detector(), images, preprocessing=PRESETS["yolox"])
    assert corner.mean_ap is not None
    assert corner.mean_ap < 0.6  # only the square image is in the same place


def test_boxes_that_are_off_or_missed_cost_precision(images: Path) -> None:
    (x, y, width, height, *rest), other = BOXES
    shifted = scored(detector([(x + width / 4, y, width, height, *rest), other]), images)  # overlaps by 0.6
    assert shifted.mean_ap50 == pytest.approx(1.0)
    assert shifted.mean_ap == pytest.approx((1.0 + 0.3) / 2, abs=0.06)  # 3 of 10 thresholds; 2 where rounding says so
    missed = scored(detector([other]), images)
    assert missed.mean_ap == pytest.approx(0.5)
    false = scored(detector([*BOXES, (10.0, 10.0, 8.0, 8.0, 0, 0.95)]), images)
    assert false.mean_ap == pytest.approx((1.0 + 0.5) / 2)


def test_with_a_dense_model_closeness_is_measured_on_the_way(images: Path) -> None:
    alone = onnx_asr.evaluate(detector(seed=1), images, dense=detector(), preprocessing=YOLOV5)
    both = scored(detector(seed=1), images, dense=detector())
    assert both.snr_db is not None
    assert both.snr_db == alone.snr_db
    assert both.mean_ap == pytest.approx(1.0)

    def metric(samples: Any, dense: Any, outputs: Any) -> float:
        return float(np.abs(outputs["boxes"]).max())

    assert scored(detector(), images, dense=detector(), metric=metric).metric == pytest.approx(44.0, abs=1e-3)


def test_several_models_on_the_same_samples(images: Path) -> None:
    how = Scoring(samples=2, detector=DetectorOptions(annotations(), "yolov5"))
    models = [detector(), detector([(*BOXES[0][:5], 0.0), BOXES[1]])]
    found = evaluate_all(models, images, how, dense=detector(seed=1), preprocessing=YOLOV5)
    assert [one.mean_ap for one in found] == pytest.approx([1.0, 0.5])
    assert {one.samples for one in found} == {2}
    small = net("small (float[N,3,32,32] images) => (float[N,3,32,32] y) { y = Relu(images) }")
    with pytest.raises(ModelError, match=r"take different samples, .*\(3, 64, 64\).*\(3, 32, 32\).*one by one"):
        evaluate_all([models[0], small], images, how, preprocessing=YOLOV5)


def test_images_that_are_not_annotated_do_not_count(images: Path) -> None:
    write_images(images, {"z.png": (30, 30)})
    few = annotations({name: SIZES[name] for name in ("b.png", "c.png")})
    found = scored(detector(), [images], few)
    assert (found.samples, found.mean_ap) == (2, pytest.approx(1.0))
    assert scored(detector(), images, samples=1).samples == 1


def test_a_fixed_batch_size(images: Path) -> None:
    model = detector()
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 2
    assert scored(model, images).samples == 2


def wrapped(text: str, outputs: str, **weights: Any) -> onnx.ModelProto:
    """A net whose outputs are constants, for every image."""
    return net(
        f"""
        constant (float[1,3,{SIDE},{SIDE}] images) => ({outputs}) {{
            mean = ReduceMean<axes=[1,2,3], keepdims=0>(images)
            zero = Mul(mean, nothing)
            {text}
        }}
        """,
        nothing=np.float32(0),
        **weights,
    )


CORNERS = np.array([[x - w / 2, y - h / 2, x + w / 2, y + h / 2] for x, y, w, h, *_ in BOXES], np.float32)
SCORES = np.array([box[5] for box in BOXES], np.float32)


def test_results_of_a_suppression_in_pixels_and_in_shares(images: Path) -> None:
    labels = np.array([3, 5])  # the numbers of the categories
    for corners in (CORNERS, CORNERS / SIDE):
        model = wrapped(
            "boxes = Add(zero, b) scores = Add(zero, s) labels = Identity(l)",
            "float[k,4] boxes, float[k] scores, int64[k] labels",
            b=corners,
            s=SCORES,
            l=labels,
        )
        assert scored(model, images, decode="nms", category_ids=True).mean_ap == pytest.approx(1.0)
        with pytest.raises(DataError, match=r"finds class 5 .*--category-ids"):
            scored(model, images, decode="nms")


def test_scores_with_a_background(images: Path) -> None:
    scores = np.array([[[0.1, 0.9, 0.0], [0.2, 0.0, 0.8]]], np.float32)
    model = wrapped(
        "boxes = Add(zero, b) scores = Add(zero, s)",
        "float[1,k,4] boxes, float[1,k,3] scores",
        b=CORNERS[None] / SIDE,
        s=scores,
    )
    assert scored(model, images, decode="ssd", label_offset=1).mean_ap == pytest.approx(1.0)
    with pytest.raises(DataError, match=r"finds class 2 .*--label-offset 1"):
        scored(model, images, decode="ssd")


def test_the_overlap_can_be_chosen(images: Path) -> None:
    (x, y, *rest), other = BOXES
    twice = detector([(x, y, *rest), (x + 4.0, y, *rest[:-1], 0.95), other])  # they overlap by 2 / 3
    assert scored(twice, images).mean_ap50 == pytest.approx(1.0)
    kept = scored(twice, images, nms_iou=0.7)
    assert kept.mean_ap50 is not None
    assert kept.mean_ap50 <= 1.0
    assert kept.mean_ap != scored(twice, images, nms_iou=0.6).mean_ap


def test_annotations_of_other_images_are_refused(images: Path) -> None:
    wrong = annotations(SIZES | {"b.png": (90, 60)})
    with pytest.raises(DataError, match=r"b\.png is 60 x 90 pixels, but .* has boxes for 90 x 60: .*--no-exif"):
        scored(detector(), images, wrong)
    with pytest.raises(DataError, match=r"none of the 3 images .* give images and annotations of one data set"):
        scored(detector(), images, annotations({"x.png": (64, 64)}))
    with pytest.raises(DataError, match=r"none of the 2 images \(the first is #0\)"):
        scored(detector(), np.zeros((2, 64, 64, 3), np.uint8))
    with pytest.raises(ModelError, match=r"'boxes' \[3, 2, 7\] cannot be decoded so .* give another --decode"):
        scored(detector(), images, decode="yolox")


class Nameless(Dataset):
    """Tensors that are named like images."""

    def _samples(self, indices: Any) -> Any:
        return [{"images": np.zeros((3, SIDE, SIDE), np.float32)} for _ in indices]


def test_tensors_have_no_pixels_to_go_back_to() -> None:
    with pytest.raises(DataError, match="boxes are compared on images, but the data are ready tensors"):
        scored(detector(), Nameless(list(SIZES), None, None))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"annotations": "a.json"}, r"give --decode, one of yolox, yolov5"),
        ({"annotations": "a.json", "decode": "yolo"}, r"decode is 'yolo': give one of yolox, yolov5, yolov8, ssd"),
        ({"annotations": "a.json", "decode": "ssd", "nms_iou": 1.5}, r"nms-iou 1.5 is out of range"),
        ({"decode": "ssd"}, r"decode came without boxes to compare with: give --annotations FILE.json, too"),
        ({"nms_iou": 0.5}, r"nms-iou came without"),
        ({"category_ids": True}, r"category-ids came without"),
    ],
)
def test_options_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        DetectorOptions(**options)


def test_labels_are_for_classifiers(images: Path) -> None:
    with pytest.raises(OptionError, match=r"labels are for classifiers, annotations for detectors"):
        scored(detector(), images, labels=[0, 1, 2])
    with pytest.raises(OptionError, match=r"or the boxes of a detector's images \(--annotations\)"):
        onnx_asr.evaluate(detector(), images, preprocessing=YOLOV5)


def test_placement_in_the_fixture_is_that_of_the_preset() -> None:
    """The annotations of these tests are computed by hand; the letterbox has to be the same."""
    assert placed((128, 96)) == (0.5, 0, 8)
    assert placed((60, 90)) == (SIDE / 90, 10, 0)
    assert Preprocessing.from_options(preset="yolov5") == YOLOV5


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("coco/fastestdet_coco_bn.onnx", "fastestdet"),
        ("coco/yolov5n_coco_bn_416.onnx", "yolov5"),
        ("graphs/yolox_nano_coco.onnx", "yolox"),
    ],
)
def test_as_another_tool_scores(path: str, kind: Any, tmp_path: Path) -> None:
    """A few real images, scored by an independent script; all of them agree to 0.01 points."""
    other, folder = scorer(), ASSETS / "coco"
    if not (ASSETS / path).exists():
        pytest.skip("needs ../shared/assets")
    cv2 = pytest.importorskip("cv2")
    import onnxruntime

    content = json.loads((folder / "instances_val2017_328.json").read_text())
    content["images"] = sorted(content["images"], key=lambda image: image["id"])[:8]
    numbers = [image["id"] for image in content["images"]]
    content["annotations"] = [box for box in content["annotations"] if box["image_id"] in numbers]
    found = scored(onnx.load(ASSETS / path), folder / "val2017", content, PRESETS[kind], decode=kind)

    session = onnxruntime.InferenceSession(ASSETS / path, providers=["CPUExecutionProvider"])
    one = session.get_inputs()[0]
    prepare, decode, floor, iou = other.KINDS[kind]
    detections = []
    for image in content["images"]:
        pixels = cv2.imread(str(folder / "val2017" / image["file_name"]))
        boxes, scores, classes, _ = other.detect(
            lambda x: session.run(None, {one.name: x}), pixels, prepare, decode, *one.shape[2:], floor, iou
        )
        detections += [
            {
                "image_id": image["id"],
                "category_id": other.COCO_IDS[number],
                "bbox": [left, top, right - left, bottom - top],
                "score": score,
            }
            for (left, top, right, bottom), score, number in zip(boxes.tolist(), scores.tolist(), classes, strict=True)
        ]
    from pycocotools.coco import COCO

    truth = COCO()
    truth.dataset = content
    truth.createIndex()
    stats = other.evaluate(truth, detections, numbers)
    assert found.samples == 8
    assert found.mean_ap == pytest.approx(stats[0], abs=1e-4)
    assert found.mean_ap50 == pytest.approx(stats[1], abs=1e-4)
