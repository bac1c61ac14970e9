"""A small file in each official layout, and how tests write and read such files."""

import json

import pytest

from triptych.data.sources import open_source

VQA_QUESTIONS = {
    "info": {"version": "2.0"},
    "task_type": "Open-Ended",
    "data_type": "mscoco",
    "data_subtype": "val2014",
    "license": {},
    "questions": [
        {"image_id": 42, "question": "Is it red?", "question_id": 42000},
        {"image_id": 42, "question": "How many?", "question_id": 42001},
    ],
}


def vqa_annotation(question_id, image_id, texts, **types):
    answers = [{"answer": text, "answer_confidence": "yes", "answer_id": n} for n, text in enumerate(texts, start=1)]
    return {"question_id": question_id, "image_id": image_id, "answers": answers, **types}


VQA_ANNOTATIONS = {
    "data_subtype": "val2014",
    "annotations": [
        vqa_annotation(42001, 42, ["2"] * 9 + ["two"], answer_type="number", question_type="how many"),
        vqa_annotation(42000, 42, ["no"] * 10, answer_type="yes/no", question_type="is it"),
    ],
}
GQA = {
    "0517": {
        "imageId": "n161313",
        "question": "Is the hat red?",
        "answer": "yes",
        "fullAnswer": "Yes, it is.",
        "isBalanced": True,
        "types": {"structural": "verify", "semantic": "attr", "detailed": "verifyAttr"},
        "semantic": [],
    },
    "0518": {"imageId": "2405722", "question": "What is it?", "answer": "a hat", "types": {}},
}
VISUAL_GENOME = [
    {
        "id": 1,
        "qas": [
            {"a_objects": [], "q_objects": [], "qa_id": 7, "image_id": 1, "question": "What?", "answer": "A clock."},
            {"a_objects": [], "q_objects": [], "qa_id": 8, "image_id": 1, "question": "Where?", "answer": "Left."},
        ],
    },
    {"id": 2, "qas": [{"qa_id": 9, "image_id": 2, "question": "Who?", "answer": "Nobody."}]},
]
COCO = {
    "info": {},
    "licenses": [],
    "images": [
        {
            "id": 9,
            "file_name": "000000000009.jpg",
            "coco_url": "http://images.cocodataset.org/val2017/000000000009.jpg",
        },
        {
            "id": 2,
            "file_name": "000000000002.jpg",
            "coco_url": "http://images.cocodataset.org/val2017/000000000002.jpg",
        },
    ],
    "annotations": [
        {"id": 1, "image_id": 2, "caption": "a cat"},
        {"id": 2, "image_id": 9, "caption": "a dog "},
        {"id": 3, "image_id": 2, "caption": "one cat"},
    ],
}


def nocaps_image(number, name, domain):
    url = f"https://s3.amazonaws.com/nocaps/val/{name}.jpg"
    found = {"id": number, "open_images_id": name, "file_name": f"{name}.jpg", "coco_url": url, "domain": domain}
    return {**found, "width": 4, "height": 4, "license": 0, "date_captured": "2018-11-06 11:04:33"}


NOCAPS = {
    "images": [nocaps_image(0, "0013ea", "in-domain"), nocaps_image(1, "00aa", "out-domain")],
    "annotations": [{"id": 0, "image_id": 0, "caption": "a baby"}],
}
KARPATHY = {
    "dataset": "coco",
    "images": [
        {"filename": "1.jpg", "filepath": "val2014", "split": "train", "cocoid": 1, "sentences": [{"raw": "a cat"}]},
        {"filename": "2.jpg", "filepath": "val2014", "split": "val", "cocoid": 2, "sentences": [{"raw": "a dog"}]},
    ],
}


def nlvr2(name, label, **more):
    urls = {"left_url": "http://x/l.jpg", "right_url": "http://x/r.jpg"}
    row = {"identifier": name, "sentence": "There are two dogs.", "label": label, "synset": "dog", "writer": "61"}
    return {**row, **urls, "query": "dogs1", "validation": {"61": label}, **more}


NLVR2 = [nlvr2("dev-850-0-0", "False"), nlvr2("dev-850-0-1", "True")]


def snli_ve(name, label, key="Flickr30K_ID"):
    row = {"gold_label": label, "sentence1": "A man walks.", "sentence2": "A man sits.", "pairID": f"{name}#0r1e"}
    return {**row, "annotator_labels": [label], "captionID": f"{name}#0", "sentence2_parse": "(ROOT)", key: name}


SNLI_VE = [snli_ve("3416050480", "contradiction"), snli_ve("3416050480", "entailment")]
MSRVTT = {
    "info": {},
    "videos": [
        {"video_id": "video0", "id": 0, "category": 9, "start time": 1.0, "end time": 9.0, "split": "train"},
        {"video_id": "video1", "id": 1, "category": 3, "start time": 1.0, "end time": 9.0, "split": "test"},
    ],
    "sentences": [
        {"video_id": "video1", "caption": "a cat jumps", "sen_id": 0},
        {"video_id": "video0", "caption": "a dog runs", "sen_id": 1},
        {"video_id": "video1", "caption": "it jumps", "sen_id": 2},
    ],
}
VATEX = [{"videoID": "Ptf_2VRj-V0_000122_000132", "enCap": ["a man runs", "he runs"], "chCap": ["x"]}]
MSVD = "# comment\n\nmv89psg6zh4_33_46 a bird bathes\n-4wsuPCjDBc_5_15 a squirrel eats\nmv89psg6zh4_33_46 a bird\n"
MSVD_MAPPING = "-4wsuPCjDBc_5_15 vid1\nmv89psg6zh4_33_46 vid2\n"
MSRVTT_QA = [{"answer": "couch", "category_id": 14, "id": 158581, "question": "who is it?", "video_id": 6513}]
MSVD_QA = [
    {"answer": "bird", "id": 5, "question": "what bathes?", "video_id": 2},
    {"answer": "squirrel", "id": 6, "question": "what eats?", "video_id": 1},
]
MPLUG_VQA = [
    {
        "dataset": "vqa",
        "image": "val2014/COCO_val2014_000000000042.jpg",
        "question": "What does it say?",
        "question_id": 42002,
        "answer": ["stop"] * 9 + ["go"],
        "ocr": [[[0.1, 0.2], "STOP"], [[0.3, 0.4], "sign"]],
        "object_label": "sign&&street light",
    },
    {"dataset": "vg", "image": "1.jpg", "question": "What?", "question_id": 3, "answer": "clock"},
    {"dataset": "gqa", "image": "2.jpg", "question": "Who?", "question_id": 4, "answer": "nobody"},
]
GROUNDING = [
    {"image": "a.jpg", "phrase": "the red car", "bbox_xywh": [10, 20, 30, 40]},
    {"image": "a.jpg", "phrase": "it", "box_xyxy": [1.5, 2, 3, 4]},
]
ALBEF_NLVR = [
    {"images": ["dev/dev-850-0-img0.png", "dev/dev-850-0-img1.png"], "sentence": "Two dogs.", "label": "True"}
]
ALBEF_VE = [{"image": "4705552913", "sentence": "Two women hug.", "label": "neutral"}]
MSRVTT_1KA = [{"clip_name": "video7020", "caption": "a cat", "retrieval_key": "ret0"}]
CAPTIONS = [{"image": "a.jpg", "caption": "a cat"}, {"image": "b.jpg", "captions": ["b", "c"], "boxes": []}]

OFFICIAL = {
    "vqa_v2": VQA_QUESTIONS,
    "vqa_v2_annotations": VQA_ANNOTATIONS,
    "gqa": GQA,
    "visual_genome_qa": VISUAL_GENOME,
    "coco_captions": COCO,
    "nocaps": NOCAPS,
    "karpathy": KARPATHY,
    "nlvr2": NLVR2,
    "snli_ve": SNLI_VE,
    "msrvtt": MSRVTT,
    "vatex": VATEX,
    "msvd_captions": MSVD,
    "msvd_mapping": MSVD_MAPPING,
    "video_questions": MSRVTT_QA,
    "video_questions of MSVD": MSVD_QA,
    "videos": MSRVTT_1KA,
    "videos by path": [{"video": "video7020.mp4", "caption": "a cat"}],
    "questions": MPLUG_VQA,
    "grounding": GROUNDING,
    "statements": ALBEF_NLVR,
    "statements about one picture": [{"image": "a.png", "sentence": "There is a box.", "label": False}],
    "entailment": ALBEF_VE,
    "entailment with premise": [{"image": "a", "hypothesis": "It rains.", "premise": "Wet.", "label": "entailment"}],
    "captions": CAPTIONS,
}


@pytest.fixture(scope="session")
def official():
    """Content by the name of the format, and of some variants "format of what"."""
    return OFFICIAL


@pytest.fixture(scope="session")
def write():
    """(path, content) -> path of a file of text, of JSON lines if it is a list in a .jsonl, or else of JSON."""

    def write(path, content):
        lines = "\n".join(map(json.dumps, content)) if path.suffix == ".jsonl" else json.dumps(content)
        path.write_text(content if isinstance(content, str) else lines, encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def put():
    """(folder, *names) puts files that stand for pictures and videos."""

    def put(folder, *names):
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"x")

    return put


@pytest.fixture(scope="session")
def read():
    """(*paths, **options) -> all records, broken ones too."""
    return lambda *paths, **options: [
        record for shard in open_source(paths, **options).shards for record in shard.read()
    ]
