"""Protocols made from packed and published sets: read back, and judged with embeddings that know who is who."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pfc.data import RecordDataset
from pfc.data.errors import UsageError
from pfc.data.packing.writer import ShardedWriter
from pfc.data.protocols import made, published
from pfc.data.protocols.images import open_images
from pfc.data.protocols.table import ROLES, Protocol, read_protocol
from pfc.engine.evaluation.judgement import How
from pfc.engine.evaluation.protocol import judge
from tests.data.packing.packed import jpeg


def pack(folder: Path, labels: list[int], names: list[str] | None = None) -> Path:
    identities = max(labels) + 1 if names is None else names
    with ShardedWriter(folder, identities=identities, image_size=(8, 8), source="test", shards=2) as writer:
        for number, label in enumerate(labels):
            writer.write(label, jpeg(number))
    return folder


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


def judged(protocol: Protocol, identity: Any) -> dict[str, Any]:
    """The figures where images of one identity (int [N]) are alike, and others are not."""
    random = np.random.default_rng(0)
    centers = np.linalg.qr(random.normal(size=(64, 64)))[0]
    embeddings = centers[np.asarray(identity)] + 0.01 * random.normal(size=(len(protocol), 64))
    return judge(protocol, torch.from_numpy(embeddings.astype(np.float32)), How(samples=0)).to_dict()


def alone(identity: np.ndarray) -> np.ndarray:
    """Images without an identity get one of their own."""
    known = identity.max() + 1
    return np.where(identity < 0, known + np.arange(len(identity)) % (64 - known), identity)


def roles(protocol: Protocol) -> list[str]:
    return [ROLES[code] for code in protocol.role]


def refusal(function: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(UsageError) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# A packed set

LABELS = [i % 10 for i in range(45)] + [10]  # five or four images each, and one of one


def test_identification_in_a_packed_set(tmp_path: Path) -> None:
    source = pack(tmp_path / "sets" / "faces", LABELS, [f"name {i}" for i in range(10)] + [""])
    others = [pack(tmp_path / "sets" / f"other{i}", [0, 1] * 10) for i in range(2)]
    out = tmp_path / "protocols" / "faces.csv"
    line = made.records(source, out, gallery_images=2, distractors=others, most_distractors=15, seed=1)
    protocol = read_protocol(out)
    counts = {role: roles(protocol).count(role) for role in ("gallery", "probe", "distractor")}
    assert line == (
        f"wrote 61 images ({', '.join(f'{counts[role]} {role}' for role in dict.fromkeys(roles(protocol)))}): {out}"
    )
    assert counts["distractor"] == 15
    assert {name.partition("#")[0] for name in protocol.images[46:]} == {"../sets/other0", "../sets/other1"}
    assert len(set(protocol.images)) == 61
    assert list(protocol.images[:46]) == [f"../sets/faces#{i}" for i in range(46)]
    dataset = RecordDataset.open(source)
    labels = [dataset.label(i) for i in range(46)]
    assert [protocol.names["identity"][code] for code in protocol.identity[:46]] == [
        "10" if label == 10 else f"name {label}" for label in labels
    ]
    images = open_images(protocol.images, protocol.folder)
    assert all(bytes(images[i]) == dataset.read(i)[1].tobytes() for i in range(46))
    in_gallery = dict.fromkeys(range(11), 0)
    for label, role in zip(labels, roles(protocol), strict=False):
        in_gallery[label] += role == "gallery"
    assert sum(count == 0 for count in in_gallery.values()) == round(0.5 * 11)
    assert all(count == (1 if label == 10 else 2) for label, count in in_gallery.items() if count)
    figures = judged(protocol, np.where(protocol.identity < 0, 20, protocol.identity))
    assert figures["rank_1"] == figures["tpir_at_fpir_1e-1"] == 1
    assert figures["mated_probes"] + figures["non_mated_probes"] == counts["probe"]


def test_the_choice_is_the_seeds(tmp_path: Path) -> None:
    source = pack(tmp_path / "faces", LABELS)
    texts = []
    for number, seed in enumerate((0, 0, 1)):
        made.records(source, tmp_path / f"{number}.csv", seed=seed)
        texts.append((tmp_path / f"{number}.csv").read_text())
    assert texts[0] == texts[1] != texts[2]
    made.records(source, tmp_path / "closed.csv", non_mated=0)
    protocol = read_protocol(tmp_path / "closed.csv")
    assert roles(protocol).count("gallery") == 11  # one of each identity
    assert set(protocol.names["identity"]) == {str(i) for i in range(11)}


def test_retrieval_in_a_packed_set(tmp_path: Path) -> None:
    source = pack(tmp_path / "faces", LABELS)
    assert made.records(source, tmp_path / "t.csv", retrieval=True) == f"wrote 46 images: {tmp_path / 't.csv'}"
    protocol = read_protocol(tmp_path / "t.csv")
    figures = judged(protocol, protocol.identity)
    assert figures["recall_at_1"] == figures["map_at_r"] == 1
    assert (figures["queries"], figures["queries_without_mates"]) == (45, 1)


def test_wrong_choices_in_a_packed_set(tmp_path: Path) -> None:
    source, out = pack(tmp_path / "faces", LABELS), tmp_path / "t.csv"
    assert "faces is given twice" in refusal(
        made.records, source, out, distractors=[tmp_path / "sets" / ".." / "faces"]
    )
    other = pack(tmp_path / "other", [0])
    assert "other is given twice" in refusal(made.records, source, out, distractors=[other, other])
    assert "distractors belong to identification" in refusal(
        made.records, source, out, distractors=[other], retrieval=True
    )
    assert "share below 1" in refusal(made.records, source, out, non_mated=1)
    assert "at least 1 image" in refusal(made.records, source, out, gallery_images=0)
    assert "faces: no identity in the gallery has more than 5 image(s)" in refusal(
        made.records, source, out, gallery_images=5
    )
    assert "no such data set" in refusal(made.records, tmp_path / "none", out)
    assert not out.exists()


# IJB

POINTS = "38 51 73 51 56 71 41 92 70 92"


def write_ijb(folder: Path, stem: str = "ijbc", galleries: tuple[str, str] = ("G1", "G2")) -> Path:
    """Templates 1 and 2 of subject 7, 3 and 4 of subject 8; 5 of subject 9, whom neither gallery has."""
    meta = folder / "meta"
    touch(folder / "loose_crop", *(f"{i}.jpg" for i in range(1, 11)))
    meta.mkdir()
    templates = [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    (meta / f"{stem}_face_tid_mid.txt").write_text("".join(f"{i}.jpg {t} {i}\n" for i, t in enumerate(templates, 1)))
    (meta / f"{stem}_name_5pts_score.txt").write_text("".join(f"{i}.jpg {POINTS} 0.{i}\n" for i in range(1, 11)))
    (meta / f"{stem}_template_pair_label.txt").write_text("1 2 1\n3 4 1\n1 4 0\n1 3 0\n")
    header = "TEMPLATE_ID,SUBJECT_ID,FILENAME\n"
    (meta / f"{stem}_1N_gallery_{galleries[0]}.csv").write_text(header + "1,7,a\n1,7,b\n")
    (meta / f"{stem}_1N_gallery_{galleries[1]}.csv").write_text(header + "3,8,a\n")
    (meta / f"{stem}_1N_probe_mixed.csv").write_text(header + "2,7,a\n4,8,a\n5,9,a\n")
    return folder


@pytest.mark.parametrize("which", ["IJBB", "IJBC"])
def test_ijb(which: Any, tmp_path: Path) -> None:
    galleries = {"IJBB": ("S1", "S2"), "IJBC": ("G1", "G2")}[which]
    write_ijb(tmp_path / which, which.lower(), galleries)
    out = tmp_path / "made" / "ijb.csv"
    line = published.ijb(tmp_path, out, which)  # the folder that IJBB and IJBC lie in
    assert line == f"wrote 10 images (4 gallery, 6 probe) and 4 pairs, 2 of them matching: {out}"
    protocol = read_protocol(out)
    assert protocol.images[0] == f"../{which}/loose_crop/1.jpg"
    assert bytes(open_images(protocol.images, protocol.folder)[9]) == b"10.jpg"
    assert protocol.weight is not None
    assert protocol.weight.tolist() == pytest.approx([float(f"0.{i}") for i in range(1, 11)])
    assert protocol.landmarks is not None
    assert protocol.landmarks[4].ravel().tolist() == [float(x) for x in POINTS.split()]
    assert protocol.names["gallery"] == list(galleries)
    assert protocol.names["identity"] == ["7", "8", "9"]
    assert protocol.media is not None
    assert len(set(protocol.media.tolist())) == 10
    figures = judged(protocol, protocol.identity)
    assert (figures["templates"], figures["pairs"], figures["auc"]) == (5, 4, 1)
    assert figures["rank_1"] == 1
    assert (figures["mated_probes"], figures["non_mated_probes"]) == (2, 4)  # in both galleries


def test_ijb_without_the_lists_of_searches(tmp_path: Path) -> None:
    folder = write_ijb(tmp_path / "set")
    for path in folder.glob("meta/*1N*"):
        path.unlink()
    published.ijb(folder, tmp_path / "t.csv", "IJBC")
    protocol = read_protocol(tmp_path / "t.csv")
    assert (protocol.identity == -1).all()
    assert "identity" not in protocol.names
    assert judged(protocol, np.repeat([0, 0, 1, 1, 2], 2))["auc"] == 1


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("face_tid_mid.txt", None, "ijbc_face_tid_mid.txt: no such file or directory; check the path"),
        ("template_pair_label.txt", None, "ijbc_template_pair_label.txt: no such file or directory"),
        ("face_tid_mid.txt", "1.jpg 1\n", "_face_tid_mid.txt: line 1 has 2 fields where image, template and media"),
        ("face_tid_mid.txt", "1.jpg 1 1\n", "_name_5pts_score.txt: line 2 has no partner: {}/ijbc_face_tid_mid.txt"),
        ("name_5pts_score.txt", f"1.jpg {POINTS} 1\n", "_face_tid_mid.txt: line 2 has no partner: {}/ijbc_name_5pts"),
        (
            "name_5pts_score.txt",
            f"1.jpg {POINTS} 1\n\n3.jpg {POINTS} 1\n",
            "_face_tid_mid.txt: line 2: image 2.jpg, but {}/ijbc_name_5pts_score.txt: line 3: 3.jpg",
        ),
        ("name_5pts_score.txt", f"1.jpg {POINTS}\n", "_name_5pts_score.txt: line 1 has 11 fields"),
        ("name_5pts_score.txt", f"1.jpg {POINTS[:-2]}x 1\n", "_name_5pts_score.txt: line 1: y5 x is no number"),
        ("name_5pts_score.txt", f"1.jpg {POINTS} -1\n", "_name_5pts_score.txt: line 1: weight -1 is no number from 0"),
        (
            "template_pair_label.txt",
            "1 2 1\n1 6 0\n",
            "_pair_label.txt: line 2: template 6 has no image in {}/ijbc_face",
        ),
        ("template_pair_label.txt", "6 1 1\n", "_pair_label.txt: line 1: template 6 has no image"),
        ("template_pair_label.txt", "1 2 2\n", "_pair_label.txt: line 1: 2 does not say whether both are one"),
        ("template_pair_label.txt", "", "/set lists no pair"),
        ("1N_gallery_G2.csv", None, "ijbc_1N_gallery_G2.csv is missing: bring it"),
        ("1N_gallery_G2.csv", "A,B\n1,2\n", "ijbc_1N_gallery_G2.csv has no columns TEMPLATE_ID and SUBJECT_ID"),
        (
            "1N_probe_mixed.csv",
            "TEMPLATE_ID,SUBJECT_ID\n2,7\n1,7\n",
            "_1N_probe_mixed.csv: line 3: template 1 was of another role, list or subject before",
        ),
    ],
)
def test_wrong_ijb(file: str, text: str | None, message: str, tmp_path: Path) -> None:
    path = write_ijb(tmp_path / "set") / "meta" / f"ijbc_{file}"
    path.unlink() if text is None else path.write_text(text)
    assert message.format(path.parent) in refusal(published.ijb, tmp_path / "set", tmp_path / "t.csv", "IJBC")
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


# The other published sets


def test_market(tmp_path: Path) -> None:
    folder = tmp_path / "Market-1501"
    touch(folder / "query", "0001_c1s1_000151_01.jpg", "0002_c2s1_000151_01.jpg", "Thumbs.db")
    names = [
        "0001_c1s1_000176_01.jpg",
        "0001_c2s1_1_1.jpg",
        "0002_c1s1_1_1.jpg",
        "-1_c1s1_1_1.jpg",
        "0000_c3s1_1_1.jpg",
    ]
    touch(folder / "bounding_box_test", *names)
    assert published.market(tmp_path, tmp_path / "t.csv").startswith(
        "wrote 6 images (2 query, 1 distractor, 3 gallery)"
    )
    protocol = read_protocol(tmp_path / "t.csv")
    assert protocol.images[0] == "Market-1501/query/0001_c1s1_000151_01.jpg"
    assert protocol.images[2].endswith("bounding_box_test/0000_c3s1_1_1.jpg")
    assert not any("-1_" in image for image in protocol.images)
    assert protocol.identity.tolist() == [0, 1, -1, 0, 0, 1]
    assert protocol.names["camera"] == ["1", "2", "3"]
    figures = judged(protocol, alone(protocol.identity))
    assert (figures["queries"], figures["cmc_1"], figures["map"]) == (2, 1, 1)
    touch(folder / "query", "somebody.jpg")
    assert "query/somebody.jpg: its name does not say who it is" in refusal(
        published.market, folder, tmp_path / "u.csv"
    )
    assert "t.csv exists already" in refusal(published.market, folder, tmp_path / "t.csv")
    assert "holds no query, and no sub-folder of it does" in refusal(
        published.market, folder / "query", tmp_path / "u.csv"
    )


def test_stanford_online_products(tmp_path: Path) -> None:
    folder = tmp_path / "sop"
    touch(folder, *(f"bike_final/{i}_0.JPG" for i in range(6)))
    lines = [f"{i} {i // 2} 1 bike_final/{i}_0.JPG\n" for i in range(6)]
    (folder / "Ebay_test.txt").write_text("image_id class_id super_class_id path\n" + "".join(lines))
    published.sop(folder, tmp_path / "t.csv")
    protocol = read_protocol(tmp_path / "t.csv")
    assert bytes(open_images(protocol.images, protocol.folder)[5]) == b"bike_final/5_0.JPG"
    assert protocol.identity.tolist() == [0, 0, 1, 1, 2, 2]
    assert judged(protocol, protocol.identity)["recall_at_1"] == 1
    (folder / "Ebay_test.txt").write_text("image_id class_id super_class_id path\n1 2 3\n")
    assert "Ebay_test.txt: line 2 has 3 fields where image_id" in refusal(published.sop, folder, tmp_path / "u.csv")
    (folder / "Ebay_test.txt").write_text("image_id class_id super_class_id path\n")
    assert "sop lists no image" in refusal(published.sop, folder, tmp_path / "u.csv")


@pytest.mark.parametrize("below", ["Testing_Set", "."])
def test_tinyface(below: str, tmp_path: Path) -> None:
    folder = tmp_path / "tinyface" / below
    touch(folder / "Probe", "1_1.jpg", "002_1.jpg")
    touch(folder / "Gallery_Match", "1_2.jpg", "2_2.png", "1_3.jpg")
    touch(folder / "Gallery_Distractor", "a/x.jpg", "17.jpg")
    published.tinyface(tmp_path / "tinyface", tmp_path / "t.csv")
    protocol = read_protocol(tmp_path / "t.csv")
    assert roles(protocol) == ["probe"] * 2 + ["gallery"] * 3 + ["distractor"] * 2
    identities = [protocol.names["identity"][code] if code >= 0 else "" for code in protocol.identity]
    assert identities == ["2", "1", "1", "1", "2", "", ""]
    figures = judged(protocol, alone(protocol.identity))
    assert (figures["rank_1"], figures["mated_probes"], figures["rank_1_with_2_distractors"]) == (1, 2, 1)
    touch(folder / "Probe", "nobody.jpg")
    assert "Probe/nobody.jpg: its name does not say" in refusal(published.tinyface, folder, tmp_path / "u.csv")
    (folder / "Probe" / "nobody.jpg").unlink()
    (folder / "Gallery_Match").rename(folder / "elsewhere")
    assert "Gallery_Match: no such folder" in refusal(published.tinyface, folder, tmp_path / "u.csv")


def test_megaface(tmp_path: Path) -> None:
    probes = [f"{who}/{who}_{i}.png" for who in ("Anna", "Bob") for i in range(3)]
    distractors = [f"1/2@N00/{i}.jpg" for i in range(12)]
    touch(tmp_path / "data" / "facescrub", *probes)
    touch(tmp_path / "data" / "megaface", *distractors)
    lists = tmp_path / "probes.json", tmp_path / "distractors.json_12_1"
    lists[0].write_text(json.dumps({"path": probes, "id": ["a"] * 3 + ["b"] * 3}))
    lists[1].write_text(json.dumps({"path": distractors}))
    published.megaface(tmp_path / "data", tmp_path / "t.csv", *lists)
    protocol = read_protocol(tmp_path / "t.csv")
    assert bytes(open_images(protocol.images, protocol.folder)[17]) == b"1/2@N00/11.jpg"
    assert roles(protocol) == ["probe"] * 6 + ["distractor"] * 12
    assert protocol.names["identity"] == ["a", "b"]
    figures = judged(protocol, alone(protocol.identity))
    assert (figures["searches"], figures["rank_1_with_12_distractors"]) == (12, 1)
    lists[0].write_text(json.dumps({"path": probes}))
    published.megaface(tmp_path / "data", tmp_path / "u.csv", *lists)
    assert read_protocol(tmp_path / "u.csv").names["identity"] == ["Anna", "Bob"]
    for content, message in (
        ("{", "probes.json is no JSON"),
        ('{"id": []}', 'probes.json is no list of MegaFace: it is {"path": [...], "id": [...]}'),
        ("[]", "probes.json is no list of MegaFace"),
        ('{"path": ["a.jpg", "b.jpg"], "id": ["a"]}', "probes.json has 2 paths, and not as many ids"),
        ('{"path": ["Eve/1.jpg"]}', "data holds no Eve/1.jpg, and no sub-folder of it does"),
        ('{"path": ["facescrub.jpg"]}', "probes.json: path 0: facescrub.jpg has no id, and is in no folder"),
    ):
        touch(tmp_path / "data", "facescrub.jpg")
        lists[0].write_text(content)
        assert message in refusal(published.megaface, tmp_path / "data", tmp_path / "v.csv", *lists)
    lists[0].unlink()
    assert "probes.json: no such file" in refusal(published.megaface, tmp_path / "data", tmp_path / "v.csv", *lists)


@pytest.mark.parametrize("kind", ["wespeaker", "voxceleb"])
def test_trials(kind: str, tmp_path: Path) -> None:
    rows = [("a/1.wav", "a/2.wav", 1), ("b/1.wav", "a/2.wav", 0), ("b/1.wav", "b/2.wav", 1), ("a/1.wav", "b/2.wav", 0)]
    lines = [
        f"{one} {other} {'target' if same else 'nontarget'}" if kind == "wespeaker" else f"{same} {one} {other}"
        for one, other, same in rows
    ]
    (tmp_path / "vox.txt").write_text("\n".join(lines) + "\n\n")
    line = made.trials(tmp_path / "vox.txt", tmp_path / "t.csv")
    assert line == f"wrote 4 images and 4 pairs, 2 of them matching: {tmp_path / 't.csv'}"
    protocol = read_protocol(tmp_path / "t.csv")
    assert list(protocol.images) == ["a/1.wav", "a/2.wav", "b/1.wav", "b/2.wav"]
    assert protocol.pairs is not None
    assert protocol.pairs.first.tolist() == [0, 2, 2, 0]
    assert protocol.pairs.second.tolist() == [1, 1, 3, 3]
    assert protocol.pairs.same.tolist() == [True, False, True, False]
    figures = judged(protocol, [0, 0, 1, 1])
    assert (figures["eer"], figures["pairs"]) == (0, 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a b target\na b\n", "vox.txt: line 2 has 2 fields where enroll, test, target or nontarget are wanted"),
        ("a b target\na b maybe\n", "vox.txt: line 2: maybe does not say whether both are one: write 1 or 0"),
        ("", "vox.txt lists no image: it is empty"),
        (None, "vox.txt: no such file or directory; check the path"),
    ],
)
def test_wrong_trials(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "vox.txt").write_text(text)
    assert message in refusal(made.trials, tmp_path / "vox.txt", tmp_path / "t.csv")
    assert not (tmp_path / "t.csv").exists()
