import sys

import pytest
import timm
import torch
from conftest import photograph, save_tiny_clip

from apm.data.prompts import CLIP80, SINGLE, load_templates
from apm.teachers import ClassifierTeacher, imagenet_index, load_token_teacher


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    return save_tiny_clip(tmp_path_factory.mktemp("clip") / "tiny.pt")


def test_a_clip_state_dict_loads_by_its_path_with_random_weights(tiny_clip):
    import clip

    teacher = load_token_teacher(str(tiny_clip))
    reference, preprocess = clip.load(str(tiny_clip), device="cpu")
    image = preprocess(photograph())[None]
    with torch.no_grad():
        expected = reference.encode_image(image)
    torch.testing.assert_close(teacher(teacher.preprocess(photograph())[None]), expected)
    assert expected.norm() != pytest.approx(1, abs=1e-2)  # not normalised


def test_class_embeddings_are_mean_directions_with_random_weights(tiny_clip):
    import clip

    teacher = load_token_teacher(str(tiny_clip))
    templates = ("a photo of a {}.", "a {} in the rain")
    classes = teacher.embed_classes(("cat", "dog"), templates)
    with torch.no_grad():
        sentences = teacher.clip.encode_text(
            clip.tokenize(["a photo of a dog.", "a dog in the rain"])
        )
    mean = (sentences / sentences.norm(dim=1, keepdim=True)).mean(dim=0)
    torch.testing.assert_close(classes[1], mean / mean.norm(), atol=1e-5, rtol=0)
    embeddings = torch.randn(3, 64)
    cosines = torch.nn.functional.cosine_similarity(embeddings[:, None], classes[None], dim=2)
    torch.testing.assert_close(teacher.logits(embeddings, classes), 100 * cosines)


def test_a_classifiers_head_is_its_classes_with_random_weights():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224").eval()
    teacher = ClassifierTeacher(model)
    images = torch.randn(2, 3, 224, 224)
    classes = teacher.embed_classes(("n02123045", "Egyptian cat", "coffee mug"))
    with torch.no_grad():
        expected = model(images)[:, [281, 285, 504]]
    torch.testing.assert_close(teacher.logits(teacher(images), classes), expected)


def test_imagenet_classes_by_name_synonym_and_wordnet_id():
    assert imagenet_index("tabby") == imagenet_index("Tabby_cat") == imagenet_index("n02123045")
    assert imagenet_index("tub") == 876 and imagenet_index("bathtub") == 435  # "..., tub"
    assert imagenet_index("tench") == 0 and imagenet_index("toilet tissue") == 999
    with pytest.raises(ValueError, match=r"'tabbi' is no class of ImageNet-1k .*tabby"):
        imagenet_index("tabbi")


def test_bad_token_teachers_are_refused_in_one_line(tmp_path):
    (tmp_path / "text.pt").write_text("no weights")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    for name, message in (
        ("ViT-Z/99", "none of the clip package"),
        (str(tmp_path / "text.pt"), "text.pt"),
        (str(tmp_path / "other.pt"), "other.pt"),
        ("open_clip:ViT-Z-99/none", "open_clip:ViT-Z-99/none"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            load_token_teacher(name)
        assert "\n" not in str(error.value)


def test_open_clip_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ValueError, match="pip install open_clip_torch"):
        load_token_teacher("open_clip:ViT-H-14-quickgelu/dfn5b")


def test_templates(tmp_path):
    assert load_templates("single") == SINGLE
    clip80 = load_templates("clip80")
    assert len(set(clip80)) == 80
    assert all(template.count("{}") == 1 for template in clip80)
    (tmp_path / "mine.txt").write_text("a {}\n\n  my {}  \n", encoding="utf-8")
    assert load_templates(str(tmp_path / "mine.txt")) == ("a {}", "my {}")
    assert CLIP80.parent.name == "single_token_segmentation"


@pytest.mark.parametrize(
    "content, message",
    [
        (b"no place\n", "exactly one"),
        (b"{} and {}\n", "exactly one"),
        (b"\n", "no template"),
        (b"\xff\xfe{}", "not text"),
    ],
)
def test_bad_templates_are_refused(tmp_path, content, message):
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_templates(str(tmp_path / "bad.txt"))


def test_a_template_cannot_reach_into_the_class_name(tiny_clip, tmp_path):
    (tmp_path / "sly.txt").write_text("{0.__class__} {}\n")
    templates = load_templates(str(tmp_path / "sly.txt"))
    teacher = load_token_teacher(str(tiny_clip))
    seen = []
    tokenize = teacher.tokenize
    teacher.tokenize = lambda texts: seen.extend(texts) or tokenize(texts)
    teacher.embed_classes(("cat",), templates)
    assert seen == ["{0.__class__} cat"]
