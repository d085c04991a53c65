"""Damaged, foreign and malicious checkpoint files: refused, with a message that helps."""

from __future__ import annotations

import os
import pickle
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import quiet_trainer, sequences, sft

from rlhf_lightning.algorithms import SFTModule
from rlhf_lightning.core.checkpoint import AtomicCheckpointIO
from rlhf_lightning.core.reading import read_checkpoint


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a short run."""
    path = tmp_path_factory.mktemp("good") / "good.ckpt"
    trainer = quiet_trainer(path.parent, max_epochs=1)
    trainer.fit(sft(), sequences())
    trainer.save_checkpoint(path)
    return path


def damaged(whole: bytes) -> dict[str, tuple[bytes, str]]:
    """Damage to a file, and what the message must say."""
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    return {
        "empty": (b"", "the file is empty"),
        "cut in the middle": (whole[:middle], "whose end is missing"),
        "without its tail": (whole[:-100], "whose end is missing"),
        "zeros": (b"\0" * 5000, "no checkpoint"),
        "noise": (os.urandom(5000), "no checkpoint"),
        "text": (b"hello\n" * 10, "no checkpoint"),
        "one flipped bit": (flipped, "the checksum of its part"),
    }


@pytest.mark.parametrize("how", damaged(b"x" * 200))
def test_damage_is_named_and_so_is_the_file_to_go_back_to(
    how: str, good: Path, tmp_path: Path
) -> None:
    data, message = damaged(good.read_bytes())[how]
    bad, older, newer = tmp_path / "bad.ckpt", tmp_path / "step=3.ckpt", tmp_path / "step=5.ckpt"
    older.write_bytes(good.read_bytes())
    newer.write_bytes(data)  # damaged too: not the one to go back to
    bad.write_bytes(data)
    (tmp_path / "last.ckpt").symlink_to(bad)
    os.utime(older, (1, 1))
    expected = rf"bad\.ckpt: .*{message}.* newest whole checkpoint beside it is .*step=3\.ckpt"
    with pytest.raises(ValueError, match=expected):
        AtomicCheckpointIO().load_checkpoint(bad)
    with pytest.raises(ValueError, match=expected):
        quiet_trainer(tmp_path, max_epochs=2).fit(sft(), sequences(), ckpt_path=str(bad))
    with pytest.raises(ValueError, match=expected):
        SFTModule.load_from_checkpoint(bad)
    older.unlink()
    with pytest.raises(ValueError, match="There is no whole checkpoint beside it"):
        read_checkpoint(bad)


def test_every_flipped_bit_of_a_weight_is_found(good: Path, tmp_path: Path) -> None:
    """torch reads such a file without a word."""
    whole, expected = bytearray(good.read_bytes()), torch.load(good)["state_dict"]
    path, found = tmp_path / "flipped.ckpt", []
    generator = torch.Generator().manual_seed(0)
    for place in torch.randint(len(whole) // 4, len(whole) // 2, (20,), generator=generator):
        whole[place] ^= 4
        path.write_bytes(whole)
        try:
            weights = read_checkpoint(path)["state_dict"]
        except ValueError as error:
            found.append(str(error))
        else:  # it was in the padding between two parts
            assert all(torch.equal(weights[name], value) for name, value in expected.items())
        whole[place] ^= 4
    assert len(found) > 15
    assert all("flipped.ckpt: this checkpoint is damaged" in message for message in found)


def test_files_of_other_programs_are_named(good: Path, tmp_path: Path) -> None:
    whole = torch.load(good)
    foreign: dict[str, tuple[Any, str]] = {
        "weights": (whole["state_dict"], r"another program.*a dictionary with 'policy"),
        "list": ([1, 2], r"another program.*\(a list\)"),
        "tensor": (torch.zeros(3), r"another program.*\(a Tensor\)"),
        "nothing": ({}, r"another program.*no keys"),
        "old": ({**whole, "pytorch-lightning_version": "1.9.5"}, "written by Lightning '1.9.5'"),
        "odd": ({**whole, "pytorch-lightning_version": "x"}, "written by Lightning 'x'"),
    }
    for name, (content, message) in foreign.items():
        torch.save(content, tmp_path / f"{name}.ckpt")
        with pytest.raises(ValueError, match=rf"{name}\.ckpt: .*{message}"):
            quiet_trainer(tmp_path, max_epochs=2).fit(
                sft(), sequences(), ckpt_path=str(tmp_path / f"{name}.ckpt")
            )


def test_what_is_not_there_is_named(good: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.ckpt: there is no such .*good\.ckpt"):
        read_checkpoint(good.parent / "none.ckpt")
    with pytest.raises(FileNotFoundError, match=r"there is no such checkpoint"):
        read_checkpoint(tmp_path / "no" / "folder.ckpt")
    (tmp_path / "last.ckpt").symlink_to(tmp_path / "gone.ckpt")
    with pytest.raises(FileNotFoundError, match=r"last\.ckpt: there is no such checkpoint"):
        read_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(IsADirectoryError, match=r"a folder; give one .* there is .*good\.ckpt \("):
        read_checkpoint(good.parent)
    (tmp_path / "sharded.ckpt").mkdir()
    with pytest.raises(IsADirectoryError, match=r"consolidate_checkpoint .*sharded\.ckpt"):
        read_checkpoint(tmp_path / "sharded.ckpt")


# Malicious files


class Malicious:
    """Pickled, it makes a file when it is unpickled as code."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.canary,))


@pytest.fixture(params=[False, True], ids=["plain", "forced by the environment"])
def canary(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What must not appear."""
    if request.param:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    return tmp_path / "canary"


def attempts(path: str | Path) -> list[Any]:
    """The ways to read a checkpoint."""
    folder = Path("unused")
    return [
        lambda: AtomicCheckpointIO().load_checkpoint(path, weights_only=False),
        lambda: SFTModule.load_from_checkpoint(path),
        lambda: SFTModule.load_from_checkpoint(path, weights_only=False),
        lambda: quiet_trainer(folder, max_epochs=2).fit(
            sft(), sequences(), ckpt_path=str(path), weights_only=False
        ),
        lambda: quiet_trainer(folder).validate(
            sft(), sequences(validation=sequences().dataset), ckpt_path=str(path)
        ),
    ]


def test_code_in_a_local_file_is_never_run(canary: Path, good: Path, tmp_path: Path) -> None:
    whole = torch.load(good, weights_only=True)
    torch.save({**whole, "state_dict": Malicious(canary)}, tmp_path / "evil.ckpt")
    torch.save({**whole, "extra": [Malicious(canary)]}, tmp_path / "hidden.ckpt")
    (tmp_path / "raw.ckpt").write_bytes(pickle.dumps(Malicious(canary)))
    for name in ("evil.ckpt", "hidden.ckpt", "raw.ckpt"):
        for attempt in attempts(tmp_path / name):
            with pytest.raises(ValueError, match=rf"{name}: .*(could run code|no checkpoint)"):
                attempt()
        link = tmp_path / "link.ckpt"
        link.symlink_to(tmp_path / name)
        for attempt in attempts(f"file://{link}"):
            with pytest.raises(ValueError, match="could run code|damaged"):
                attempt()
        link.unlink()
    assert not canary.exists()


class Serve(BaseHTTPRequestHandler):
    def __init__(self, content: bytes, asked: list[str], *args: Any) -> None:
        self.content, self.asked = content, asked
        super().__init__(*args)

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.content)

    do_HEAD = do_GET


def test_nothing_is_fetched_from_the_web(canary: Path, good: Path, tmp_path: Path) -> None:
    whole = torch.load(good, weights_only=True)
    torch.save({**whole, "state_dict": Malicious(canary)}, tmp_path / "evil.ckpt")
    asked: list[str] = []
    handler = partial(Serve, (tmp_path / "evil.ckpt").read_bytes(), asked)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"127.0.0.1:{server.server_address[1]}/evil.ckpt"
        for scheme in ("http://", "HTTP://", "https://", "simplecache::http://"):
            for attempt in attempts(scheme + address):
                with pytest.raises(ValueError, match="not read from the web"):
                    attempt()
    finally:
        server.shutdown()
        server.server_close()
    assert asked == []
    assert not canary.exists()


def test_nothing_that_a_checkpoint_names_is_instantiated(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning's own loader would resolve such options through its allow-listed instantiator."""
    monkeypatch.chdir(tmp_path)
    whole = torch.load(good, weights_only=True)
    attack = {"class_path": "os.system", "init_args": {"command": "touch canary"}}
    hostile = {
        "_instantiator": "lightning.pytorch.cli.instantiate_module",
        "_class_path": "rlhf_lightning.algorithms.sft.SFTModule",
        "optimizer": attack,
        "lr_scheduler": {"class_path": "subprocess.Popen", "init_args": {"args": "touch canary"}},
        "reward": "os.system",
    }
    found = SFTModule.load_from_checkpoint(good)
    for instantiator in ("lightning.pytorch.cli.instantiate_module", "os.system"):
        hparams = {**whole["hyper_parameters"], **hostile, "_instantiator": instantiator}
        torch.save({**whole, "hyper_parameters": hparams}, "hostile.ckpt")
        module = SFTModule.load_from_checkpoint("hostile.ckpt")
        optimizer = module.configure_optimizers()
        assert isinstance(optimizer, torch.optim.AdamW)
        for name, value in found.state_dict().items():
            assert torch.equal(module.state_dict()[name], value)
        trainer = quiet_trainer(tmp_path, max_epochs=2)
        trainer.fit(sft(), sequences(), ckpt_path="hostile.ckpt")
        assert trainer.global_step == 12
    assert not (tmp_path / "canary").exists()
