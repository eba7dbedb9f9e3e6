import functools
import hashlib
import sys
import urllib.error

import pytest
import timm
import torch
from conftest import photograph, save_tiny_clip

from apm.data.class_names import load_templates
from apm.token_teachers import ClassifierTeacher, load_token_teacher


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


@pytest.fixture
def offline(monkeypatch):
    """Downloads fail; nothing else does."""
    import clip

    create = timm.create_model

    def no_network(*_, **__):
        raise urllib.error.URLError("no network")

    def create_model(name, pretrained=False, **settings):
        return no_network() if pretrained else create(name, **settings)

    monkeypatch.setattr(timm, "create_model", create_model)
    monkeypatch.setattr(clip.clip, "_download", no_network)


def test_bad_token_teachers_are_refused_in_one_line(tmp_path, tiny_clip, offline):
    (tmp_path / "text.pt").write_text("no weights")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    state = torch.load(tiny_clip, weights_only=True)
    torch.save(state | {"ln_final.bias": torch.zeros(5)}, tmp_path / "narrow.pt")
    torch.save(state | {"ln_final.bias": torch.full((64,), torch.nan)}, tmp_path / "nan.pt")
    tiny = "test_vit"
    torch.save(timm.create_model(tiny, num_classes=10).state_dict(), tmp_path / "ten.pth")
    for name, weights, message in (
        ("ViT-Z/99", None, "no file, no model of timm, none of .*ViT-L/14"),
        ("ViT-L/14", None, "'ViT-L/14': could not be had; name a local file.*no network"),
        ("ViT-L/14", tmp_path / "other.pt", "only for a classifier of timm"),
        (str(tmp_path / "text.pt"), None, "text.pt"),
        (str(tmp_path / "other.pt"), None, "other.pt"),
        (str(tmp_path / "narrow.pt"), None, "narrow.pt.*ln_final.bias"),
        (str(tmp_path / "nan.pt"), None, "nan.pt.*not finite"),
        (f"{tiny}.typo", None, f"timm has no such weights, but {tiny}.r160_in1k"),
        (f"{tiny}.typo", tmp_path / "ten.pth", f"has no such weights, but {tiny}.r160_in1k"),
        (tiny, None, "could not be downloaded; name a local file with --teacher-weights"),
        (tiny, tmp_path / "absent.pth", "absent.pth: no such teacher weights file"),
        (tiny, tmp_path / "ten.pth", r'"head.bias" is \(10,\), expected \(1000,\)'),
        ("vit_small_patch14_dinov2", None, "no linear head of the 1000 classes"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
            load_token_teacher(name, weights)
        assert "\n" not in str(error.value)


def test_identity_is_name_and_hash_of_a_local_file(tiny_clip, tmp_path):
    def sha256(path):
        return hashlib.sha256(path.read_bytes()).hexdigest()

    clip = load_token_teacher(str(tiny_clip))
    assert clip.identity == {"teacher": "tiny.pt", "weights_sha256": sha256(tiny_clip)}
    name, path = "timm/test_vit.r160_in1k", tmp_path / "vit.pth"
    torch.save(timm.create_model("test_vit").state_dict(), path)
    classifier = load_token_teacher(name, path)
    assert classifier.identity == {"teacher": name, "weights_sha256": sha256(path)}


class OpenClip:
    """The parts of OpenCLIP that are used, with random weights."""

    def __init__(self, path):
        self.path = path

    def list_models(self):
        return ["ViT-B-32", "ViT-L-14"]

    def list_pretrained_tags_by_model(self, model):
        return ["openai", "laion2b"] if model in self.list_models() else []

    def create_model_and_transforms(self, model, pretrained):
        import clip

        if pretrained == "laion2b":
            raise ConnectionError("no network")
        model, preprocess = clip.load(str(self.path), device="cpu")
        return model, None, preprocess

    def get_tokenizer(self, model):
        import clip

        return functools.partial(clip.tokenize, truncate=True)


def test_open_clip_teachers_with_random_weights(tiny_clip, monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", OpenClip(tiny_clip))
    tagged = load_token_teacher("open_clip:ViT-B-32/openai")
    assert tagged.identity == {"teacher": "open_clip:ViT-B-32/openai", "weights_sha256": None}
    local = load_token_teacher(f"open_clip:ViT-B-32/{tiny_clip}")
    assert local.identity["teacher"] == "open_clip:ViT-B-32/tiny.pt"
    assert local.identity["weights_sha256"]
    for name, message in (
        ("open_clip:ViT-B-23/openai", "ViT-B-23/openai': no file.*none of ViT-B-32, ViT-L-14"),
        ("open_clip:ViT-B-32/open", "ViT-B-32/open': no file.*none of openai, laion2b"),
        ("open_clip:ViT-B-32", "none of openai, laion2b"),
        ("open_clip:ViT-B-32/laion2b", "could not be had.*no network"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            load_token_teacher(name)
        assert "\n" not in str(error.value)


def test_prompts_that_are_cut_are_reported_once(tiny_clip, caplog):
    teacher = load_token_teacher(str(tiny_clip))
    exactly = " ".join(["cat"] * 75)  # with start and end 77 tokens
    classes = teacher.embed_classes((exactly, "dog"), ("{}",))
    assert not caplog.records
    longer = teacher.embed_classes(("dog", f"{exactly} cat", f"bird {exactly}"), ("{}",))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "prompts cut at 77 tokens: 2, as 'cat cat" in caplog.text
    torch.testing.assert_close(longer[:2], classes.flip(0))


def test_classes_that_a_clip_cannot_tell_apart_are_refused(tiny_clip, caplog):
    teacher = load_token_teacher(str(tiny_clip))
    start = "a very " + "long " * 80
    for names, message in (
        (("cat", "dog", "cat"), "classes 'cat' and 'cat' have the same"),
        (("cat", " Cat"), "classes 'cat' and ' Cat' have the same"),
        ((f"{start} cat", f"{start} dog"), "classes 'a very .* have the same 77 tokens"),
        (("cat", ""), "class name is empty"),
        (("  ", "dog"), "class name is empty"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            teacher.embed_classes(names, ("a photo of a {}", "a {}"))
        assert "\n" not in str(error.value)
    assert not caplog.records


def test_synonyms_of_one_imagenet_class_are_refused():
    teacher = ClassifierTeacher(timm.create_model("test_vit"))
    with pytest.raises(ValueError, match="classes 'tabby' and 'n02123045' are the same class"):
        teacher.embed_classes(("tabby", "tench", "n02123045"))
    with pytest.raises(ValueError, match="'' is no class of ImageNet-1k"):
        teacher.embed_classes(("tabby", ""))


def test_open_clip_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[open_clip\]'"):
        load_token_teacher("open_clip:ViT-H-14-quickgelu/dfn5b")


def test_a_template_cannot_reach_into_the_class_name(tiny_clip, tmp_path):
    (tmp_path / "sly.txt").write_text("{0.__class__} {}\n")
    templates = load_templates(str(tmp_path / "sly.txt"))
    teacher = load_token_teacher(str(tiny_clip))
    seen = []
    tokenize = teacher.tokenize
    teacher.tokenize = lambda texts, **kwargs: seen.extend(texts) or tokenize(texts, **kwargs)
    teacher.embed_classes(("cat",), templates)
    assert set(seen) - {""} == {"{0.__class__} cat"}
