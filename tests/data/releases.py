"""Small data sets in the official formats: annotation files, and media that are really there."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from tests.data.media import noise, numbered, write_video
from xkd_fast.data.datasets import open_dataset
from xkd_fast.data.sources import SourceSet


def write_media(folder: Path) -> Path:
    """A film with sound, one without, one of 3 s, and a sound alone."""
    pictures = [numbered(k, 24, 32) for k in range(30)]
    write_video(folder / "film.mkv", pictures[:13], sound=noise(0.6))
    write_video(folder / "mute.mkv", pictures[:13])
    write_video(folder / "long.mkv", pictures, fps=10, sound=noise(3.0))
    write_video(folder / "sound.wav", sound=noise(0.6))
    return folder


def lay(media: Path, root: Path, texts: dict[str, str], files: dict[str, str]) -> Path:
    """A data set's folder: annotation files by path, and which of the media lies where."""
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    for name, kind in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(media / f"{kind}{'.wav' if kind == 'sound' else '.mkv'}", root / name)
    return root


def opened(name: str, root: Path, **asked: Any) -> SourceSet:
    """A split of a small release, which is a subset of the official one."""
    return open_dataset(name, root, **({"subset": True} | asked))


def replace(root: Path, name: str, old: str, new: str) -> None:
    """Change the first place of a text in the only file of a name."""
    (path,) = root.rglob(name)
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


A, B, C, D = "--abcdefgh_", "Bbbbbbbbbbb", "Ccccccccccc", "Ddddddddddd"
K400_HEADER = "label,youtube_id,time_start,time_end,split\n"


def kinetics(media: Path, root: Path) -> Path:
    return lay(
        media,
        root,
        {
            "annotations/train.csv": f"{K400_HEADER}zumba,{A},1,11,train\nabseiling,{B},20,30,train\nzumba,{C},0,10,train\n",
            "annotations/val.csv": f'{K400_HEADER}"air, drumming",{D},5,15,val\n',
        },
        {f"videos/zumba/{A}_000001_000011.mp4": "film", f"videos/{B}_000020_000030.mp4": "film",
         f"videos/{D}_000005_000015.mp4": "film"},
    )  # fmt: skip


def audioset(media: Path, root: Path) -> Path:
    comments = (
        "# Segments csv created Sun Mar  5 10:54:31 2017\n# num_ytids=2\n# YTID, start_seconds, end_seconds, positive_labels\n"
    )
    return lay(
        media,
        root,
        {
            "class_labels_indices.csv": 'index,mid,display_name\n0,/m/09x0r,"Speech"\n1,/m/05zppz,"Male speech, man speaking"\n'
            '2,/t/dd00003,"Bark"\n',
            "balanced_train_segments.csv": f'{comments}{A}, 1.000, 2.000, "/m/05zppz,/m/09x0r"\n'
            f'{B}, 30.000, 40.000, "/t/dd00003"\n',
            "unbalanced_train_segments.csv": f'{comments}{D}, 0.000, 10.000, "/m/09x0r"\n',
            "eval_segments.csv": f'{comments}{C}, 0.000, 10.000, "/t/dd00003,/m/09x0r"\n',
        },
        {f"{A}.mkv": "long", f"balanced/{B}_30.000.mp4": "film", f"eval/{C}_0_10.mp4": "film"},
    )


def vggsound(media: Path, root: Path) -> Path:
    rows = f'{A},1,"race car, auto racing",test\n{B},30,zebra braying,train\n'
    rows += f"{C},0,people marching,train\n{C},60,zebra braying,train\n"
    return lay(
        media, root, {"vggsound.csv": rows}, {f"{A}.mkv": "long", f"{B}_000030.mp4": "film", f"x/{C}_000060.mp4": "film"}
    )


def ucf101(media: Path, root: Path) -> Path:
    lists = {
        "classInd.txt": "1 YoYo\r\n2 Archery\r\n",
        "trainlist01.txt": "YoYo/v_YoYo_g08_c01.avi 1\r\nArchery/v_Archery_g08_c01.avi 2\r\n",
        "testlist01.txt": "YoYo/v_YoYo_g01_c01.avi\r\nArchery/v_Archery_g01_c01.avi\r\n",
        "trainlist02.txt": "YoYo/v_YoYo_g01_c01.avi 1\n",
        "testlist02.txt": "YoYo/v_YoYo_g08_c01.avi\n",
    }
    files = {f"{name}/v_{name}_g{group}_c01.avi": "mute" for name in ("YoYo", "Archery") for group in ("01", "08")}
    return lay(
        media,
        root,
        {f"ucfTrainTestlist/{name}": text for name, text in lists.items()},
        {f"UCF-101/{name}": kind for name, kind in files.items()},
    )


def hmdb51(media: Path, root: Path) -> Path:
    rows = {
        "wave_test_split1.txt": "#1_(x)_wave.avi 1 \nb_wave.avi 2 \nc_wave.avi 0 \n",
        "brush_hair_test_split1.txt": "a_brush.avi 2 \nb_brush.avi 1 \n",
        "wave_test_split2.txt": "#1_(x)_wave.avi 2 \nb_wave.avi 1 \n",
    }
    files = ("wave/#1_(x)_wave.avi", "wave/b_wave.avi", "wave/c_wave.avi", "brush_hair/a_brush.avi", "brush_hair/b_brush.avi")
    return lay(
        media,
        root,
        {f"testTrainMulti_7030_splits/{name}": text for name, text in rows.items()},
        dict.fromkeys(files, "mute"),
    )


ESC50_HEADER = "filename,fold,target,category,esc10,src_file,take\n"


def esc50(media: Path, root: Path) -> Path:
    rows = [
        f"{fold}-{fold}00-A-{k}.wav,{fold},{k},{name},False,{fold}00{k},A\n"
        for fold in (1, 2)
        for k, name in enumerate(("rooster", "dog"))
    ]
    return lay(
        media,
        root,
        {"meta/esc50.csv": ESC50_HEADER + "".join(rows)},
        {f"audio/{row.split(',')[0]}": "sound" for row in rows},
    )


def fsd50k(media: Path, root: Path) -> Path:
    return lay(
        media,
        root,
        {
            "FSD50K.ground_truth/vocabulary.csv": "0,Zipper,/m/01\n1,Bark,/m/02\n2,Animal,/m/03\n",
            "FSD50K.ground_truth/dev.csv": "fname,labels,mids,split\n"
            '64760,"Bark,Animal","/m/02,/m/03",train\n16399,Zipper,/m/01,val\n',
            "FSD50K.ground_truth/eval.csv": 'fname,labels,mids\n37199,"Animal",/m/03\n',
        },
        {"FSD50K.dev_audio/64760.wav": "sound", "FSD50K.dev_audio/16399.wav": "sound", "FSD50K.eval_audio/37199.wav": "sound"},
    )
