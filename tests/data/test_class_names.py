import pytest

from apm.data.class_names import (
    CLIP80,
    SINGLE,
    imagenet_index,
    imagenet_names,
    load_templates,
    readable,
)


def test_imagenet_classes_by_name_synonym_and_wordnet_id():
    assert imagenet_index("tabby") == imagenet_index("Tabby_cat") == imagenet_index("n02123045")
    assert imagenet_index("tub") == 876 and imagenet_index("bathtub") == 435  # "..., tub"
    assert imagenet_index("tench") == 0 and imagenet_index("toilet tissue") == 999
    with pytest.raises(ValueError, match=r"'tabbi' is no class of ImageNet-1k .*tabby"):
        imagenet_index("tabbi")


def test_each_imagenet_class_has_a_name_of_its_own():
    assert [imagenet_index(name) for name in imagenet_names()] == list(range(1000))


def test_readable_names():
    assert readable("n02123045") == "tabby"
    assert readable("/a/Apse_indoor/") == "a apse indoor"


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
