"""Write demo.parquet and the pictures that its conditioned rows start from.

    python -m manifests.make_demo

Run it from the repository's root. The same code writes the same rows and the same pixels every time.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from benchmarks.demo_checkpoint import draw, world

ROW_GROUP_ROWS = 16
# Size and speed of the shapes in pictures, in the middle of what the checkpoint has seen as large and fast.
RADIUS, PATH = 0.195, 0.40

SCHEMA = pa.schema(
    [
        ("row_id", pa.string()),
        ("prompt", pa.string()),
        ("seed", pa.int64()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("num_frames", pa.int32()),
        ("frame_rate", pa.float32()),
        ("conditioning_media_paths", pa.list_(pa.string())),
        ("conditioning_start_frames", pa.list_(pa.int32())),
        ("conditioning_strengths", pa.list_(pa.float32())),
        # The rest is carried to the output untouched.
        ("shape", pa.string()),
        ("colour", pa.string()),
        ("direction", pa.string()),
        ("background", pa.string()),
        ("split", pa.string()),
        ("tags", pa.list_(pa.string())),
    ]
)


@dataclass(frozen=True)
class Demo:
    """One row. `scene` is what the prompt says: colour, shape, direction, background. `pictures` are the frames of the
    clip that are given as pictures, each with its strength."""

    scene: str
    prompt: str
    seed: int | None = None
    height: int = 128
    width: int = 128
    num_frames: int = 17
    frame_rate: float = 16.0
    pictures: tuple[tuple[int, float], ...] = ()

    @property
    def row_id(self) -> str:
        colour, shape, direction, _ = self.scene.split()
        marks = [f"seed-{self.seed}"] * (self.seed is not None) + ["from-picture"] * bool(self.pictures)
        return "-".join([colour, shape, direction, *marks])

    def picture(self, frame: int) -> str:
        """A picture's path, relative to the manifest."""
        return f"media/{self.row_id}-{frame:03d}.png"

    def values(self) -> dict[str, Any]:
        colour, shape, direction, background = self.scene.split()
        return {
            "row_id": self.row_id,
            "prompt": self.prompt,
            "seed": self.seed,
            "height": self.height,
            "width": self.width,
            "num_frames": self.num_frames,
            "frame_rate": self.frame_rate,
            "conditioning_media_paths": [self.picture(frame) for frame, _ in self.pictures] or None,
            "conditioning_start_frames": [frame for frame, _ in self.pictures] or None,
            "conditioning_strengths": [strength for _, strength in self.pictures] or None,
            "shape": shape,
            "colour": colour,
            "direction": direction,
            "background": background,
            "split": "picture" if self.pictures else "text",
            "tags": ["demo", f"{self.height}x{self.width}x{self.num_frames}"],
        }


ROWS = (
    Demo("red circle right dark", "a red circle moves right over a dark background"),
    Demo("red circle right dark", "a red circle moves right over a dark background", seed=7),
    Demo("red circle left dark", "a red circle moves left over a dark background"),
    Demo("blue square up dark", "on a dark background, a square that is blue travels up"),
    Demo("green triangle left white", "a green triangle slides left over a white background"),
    Demo("yellow star down grey", "a large yellow star drifts down over a grey background"),
    Demo("cyan circle right sand", "A small cyan ball rolls to the right across a sandy floor."),
    Demo("purple square up-right teal", "a purple box glides diagonally up and to the right on a teal background"),
    Demo("orange triangle up white", "against a white wall, an orange triangle flies up"),
    Demo("pink star down-left dark", "a pink star heading to the lower left corner, with a dark backdrop behind it"),
    Demo("blue circle right grey", "we see a big blue circle floating from left to right in front of a grey wall"),
    Demo("cyan circle left white", "A turquoise disc wanders to the left over a plain white canvas."),
    Demo("green circle up dark", "on a black background: a bright green circle going up"),
    Demo("red square down sand", "one red square marches down over a beige field"),
    Demo("purple triangle left grey", "a little purple triangle creeps left across a grey scene"),
    Demo("pink circle right teal", "over a teal background, a pink circle races right", frame_rate=24.0),
    Demo("orange star up dark", "a video of an orange star gliding upwards on a dark background"),
    Demo("yellow triangle down-right teal", "diagonally down to the right travels a yellow triangle over a teal wall"),
    Demo("green star left sand", "a green star rushes to the left in front of a sand backdrop"),
    Demo("blue triangle down white", "a blue triangle moves down over a white background"),
    Demo(
        "cyan square up-left dark",
        "a cyan square cruises up and to the left over a dark background",
        num_frames=25,
        frame_rate=24.0,
    ),
    Demo(
        "orange circle down grey",
        "an orange circle slowly sails down over a grey background",
        num_frames=25,
        frame_rate=12.0,
    ),
    Demo("yellow circle down dark", "a yellow circle moves down on a dark background", height=160, width=96),
    Demo("purple star up white", "a large purple star flies up over a white background", height=160, width=96),
    Demo("red triangle right sand", "a red triangle walks to the right over a sand background", height=160, width=160),
    Demo("green square down grey", "a green square moves down over a grey background", height=256, width=160),
    Demo(
        "red square right dark",
        "a large red square moves right over a dark background",
        pictures=((0, 1.0),),
    ),
    Demo(
        "blue circle down white",
        "a large blue circle quickly moves down over a white background",
        height=160,
        width=96,
        pictures=((0, 1.0),),
    ),
    Demo(
        "green triangle up grey",
        "a large green triangle moves up over a grey background",
        pictures=((16, 1.0),),
    ),
    Demo(
        "yellow square left teal",
        "a large yellow square moves left over a teal background",
        pictures=((0, 1.0), (16, 1.0)),
    ),
    Demo(
        "pink circle up-left sand",
        "a large pink circle moves up and to the left over a sand background",
        pictures=((0, 0.9),),
    ),
    Demo(
        "orange star right dark",
        "a large orange star moves right over a dark background",
        num_frames=25,
        pictures=((8, 1.0),),
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of demo.parquet and media/")
    write(parser.parse_args().out)


def write(folder: Path) -> None:
    """Write `demo.parquet` and `media/` below `folder`."""
    (folder / "media").mkdir(parents=True, exist_ok=True)
    for row in ROWS:
        for frame, _ in row.pictures:
            Image.fromarray(drawn(row, frame)).save(folder / row.picture(frame), optimize=True)
    table = pa.Table.from_pylist([row.values() for row in ROWS], schema=SCHEMA)
    pq.write_table(table, folder / "demo.parquet", row_group_size=ROW_GROUP_ROWS, compression="zstd")


def drawn(row: Demo, frame: int) -> Any:
    """A frame of the row's clip as a training clip would show it, uint8 [H, W, 3]; the shape crosses the middle."""
    clips, _ = draw.draw(_scene(row))
    return draw.to_uint8(clips)[0, frame].numpy()


def _scene(row: Demo) -> world.Scenes:
    colour, shape, direction, background = row.scene.split()
    side = min(row.height, row.width)
    path = torch.tensor([world.DIRECTIONS[direction]]) * PATH
    middle = torch.tensor([[row.width / side / 2, row.height / side / 2]])
    return world.Scenes(
        row.height,
        row.width,
        row.num_frames,
        shape=torch.tensor([world.SHAPES.index(shape)]),
        colour=torch.tensor([list(world.COLOURS).index(colour)]),
        direction=torch.tensor([list(world.DIRECTIONS).index(direction)]),
        background=torch.tensor([list(world.BACKGROUNDS).index(background)]),
        size=torch.tensor([list(world.SIZES).index("large")]),
        speed=torch.tensor([list(world.SPEEDS).index("fast")]),
        radius=torch.tensor([RADIUS]),
        start=middle - path / 2,
        path=path,
        tint=torch.ones(1, 3),
    )


if __name__ == "__main__":
    main()
