"""From the command line and the rows of `hparams.toml` to settings, and what is said of mistakes in them."""

import dataclasses
import itertools
import json
import re
from pathlib import Path
from typing import Any

import jax
import pytest

from baselines import REGISTRY
from envs_mjx.registry import TaskId, names
from envs_mjx.registry import parse as parse_env
from experiments.cli.arguments import flags, whole_number
from experiments.launch import hparams, settings
from experiments.launch.hparams import build, load_rows, merge_rows, patterns, row_applies, to_field_type
from experiments.launch.job import MAY_DIFFER
from experiments.launch.settings import PRESETS, EvalConfig, Settings, parse_command_line, settings_from_dict
from mac.config import Config
from mac.errors import UserError
from mac.run.io.checkpoint_compat import check_config

ROW = {"source": "a table", "hp": {"batch": 7}}


def settings_of(*argv: str) -> Settings[Any]:
    return parse_command_line(argv)[0]


def message_of(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        parse_command_line(argv)
    text = str(caught.value)
    assert "\n" not in text and "│" not in text
    return text


# Flags.


def test_flags_win_over_rows_and_rows_over_defaults():
    laptop = settings_of("--preset", "laptop")
    row = merge_rows(load_rows(hparams.HPARAMS), "mac", laptop.task_id, "laptop")
    assert laptop.hp.batch == row["hp"]["batch"] != Config().batch
    given = settings_of("--preset", "laptop", "--hp.batch", "9", "--run.keep=3", "--data.dir", "here")
    assert (given.hp.batch, given.run.keep, given.data.dir) == (9, 3, Path("here"))
    assert given.hp == dataclasses.replace(laptop.hp, batch=9)


def test_paper_preset_has_the_sizes_of_the_papers_tables():
    paper = settings_of("--preset", "paper")
    assert paper.steps == 1_000_000
    assert dataclasses.asdict(paper.hp) | {"cooldown": 0.0} == dataclasses.asdict(Config())
    assert paper.hp.hidden == (512,) * 4 and paper.hp.lr == 3e-4


@pytest.mark.parametrize(("backend", "preset"), [("cpu", "laptop"), ("gpu", "paper")])
def test_auto_preset_follows_the_device_and_says_so(
    backend: str, preset: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    settings, reason = parse_command_line([])
    assert settings.preset == preset
    assert "accelerator" in reason and "--preset" in reason
    assert parse_command_line(["--preset", "laptop"])[1] == "as asked"


def test_every_flag_is_explained_in_the_help(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        parse_command_line(["--help"])
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    names = list(flags(settings_of()))
    assert len(names) > 30
    for flag in names:
        after = re.split(f" {flag}[ ,]", shown, maxsplit=1)[1].split("(default", 1)[0]
        assert len(after.split()) >= 3, f"{flag} is not explained"


def test_help_needs_no_device(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def fail():
        raise RuntimeError("no such device")

    monkeypatch.setattr(jax, "default_backend", fail)
    with pytest.raises(SystemExit):
        parse_command_line(["--help"])
    assert "--hp.batch" in capsys.readouterr().out
    assert "no such device" in message_of()


@pytest.mark.parametrize(
    ("flag", "name", "number"),
    [("--steps", "steps", 1_000_000), ("--run.segment", "run.segment", 1_000_000)],
)
@pytest.mark.parametrize("text", ["1M", "1e6", "1000k", "1_000_000", "0.001b", "+1.0e+6"])
def test_counts_are_written_in_any_way(flag: str, name: str, number: int, text: str):
    value: Any = parse_command_line([flag, text])[0]
    for part in name.split("."):
        value = getattr(value, part)
    assert value == number


def test_counts_in_lists_and_of_seeds_are_written_in_any_way():
    settings, _ = parse_command_line(
        ["--hp.hidden", "1k", "5e1", "--seeds", "0.002k", "--data.rows", "200_200"]
    )
    assert settings.hp.hidden == (1000, 50) and settings.seeds == 2 and settings.data.rows == 200_200


@pytest.mark.parametrize(
    "text", ["1.5", "1e-3", "0.5", "1q", "", "k", "1__0", "_1", "1,000", "nan", "٣", "0x9"]
)
def test_what_is_no_whole_number_is_refused(text: str):
    with pytest.raises(ValueError, match="is not a whole number"):
        whole_number(text)


BAD_FLAGS = {
    ("--sed", "3"): ("--sed", "--seed"),
    ("--step", "5"): ("--step;", "--steps"),
    ("--hp.btch", "3"): ("--hp.btch", "did you mean --hp.batch"),
    ("--algo", "fql", "--hp.chunk", "5"): ("--hp.chunk: fql has no such", "(mac, ", "see --algo fql --help"),
    ("--hp.code_decay", "1"): ("--hp.code-decay: mac has no such hyperparameter (tap has it)",),
    ("--sweep", "hp.penalty=1,2"): ("hp.penalty: mac has no such hyperparameter",),
    ("--out", ""): ("--out: '' names no file or folder",),
    ("--auto-resume", "--out", "x" * 300): ("cannot read xxx", "too long"),
    ("--hp.penalty=1",): ("--hp.penalty: mac has no such hyperparameter (mopo, mobile have it)",),
    ("--lr", "1"): ("--lr", "did you mean --hp.lr?"),
    ("--zzz",): ("--zzz", "--help"),
    ("word",): ("word", "--help"),
    ("--resume", "1", "--out", "."): ("--resume", "config.json"),
    ("--algo", "mca"): ("--algo", "'mac'"),
    ("--env", "cube-singel-play-v0"): ("cube-singel-play-v0", "cube-single-play-v0"),
    ("--preset", "big"): ("--preset", "'big'", "laptop"),
    ("--seeds", "0"): ("--seeds=0", "at least 1"),
    ("--seeds", "-2"): ("--seeds=-2", "at least 1"),
    ("--seeds", "two"): ("--seeds=two", "whole number"),
    ("--seed", "-1"): ("--seed=-1", "[0, 2**31)"),
    ("--seed", str(2**31 - 2), "--seeds", "4"): ("--seed=", "[0, 2**31)"),
    ("--steps", "0"): ("--steps=0", "at least 1"),
    ("--steps", "-5"): ("--steps=-5", "at least 1"),
    ("--steps", "1.5"): ("--steps", "'1.5'", "whole number"),
    ("--steps", "-1k"): ("--steps=-1000", "at least 1"),
    ("--hp.hidden", "8", "8q"): ("--hp.hidden", "'8q' is not a whole number"),
    ("--steps", str(2**31)): ("--steps=", "2**31"),
    ("--steps",): ("--steps", "value"),
    ("--out",): ("--out", "argument"),
    ("--hp.batch", "abc"): ("--hp.batch", "'abc' is not a whole number"),
    ("--hp.batch", "-1"): ("--hp.batch=-1", "at least 1"),
    ("--hp.lr", "nan"): ("--hp.lr=nan", "positive and finite"),
    ("--hp.lr", "fast"): ("--hp.lr", "'fast' is not a number"),
    ("--hp.hidden",): ("--hp.hidden", "at least one width"),
    ("--hp.hidden", "8", "0"): ("--hp.hidden=(8, 0)", "at least 1"),
    ("--hp.discount", "1.5"): ("--hp.discount=1.5", "(0, 1)"),
    ("--hp.execute", "11", "--hp.chunk", "10"): ("--hp.execute=11", "--hp.chunk=10"),
    ("--hp.chunk-reward", "max"): ("--hp.chunk-reward", "'max'", "'mean'"),
    ("--run.segment", "0"): ("--run.segment=0", "at least 1"),
    ("--run.eval-every", "0"): ("--run.eval-every=0", "at least 1"),
    ("--eval.episodes", "0"): ("--eval.episodes=0", "at least 1"),
    ("--eval.engine", "bullet"): ("--eval.engine", "'bullet'", "'mjx'"),
    ("--eval.batch", "-1"): ("--eval.batch=-1", "at least 0"),
    ("--data.rows", "0"): ("--data.rows=0", "at least 1"),
    ("--data.seed", "-1"): ("--data.seed=-1", "[0, 2**31)"),
}


@pytest.mark.parametrize("argv", BAD_FLAGS, ids=" ".join)
def test_bad_flag_is_named_in_one_line_with_the_remedy(argv: tuple[str, ...]):
    message = message_of(*argv)
    for part in BAD_FLAGS[argv]:
        assert part in message


# Rows.


def test_later_rows_win_and_patterns_choose_the_environment():
    rows = [
        {**ROW, "steps": 10, "hp": {"batch": 1, "chunk": 2}},
        {**ROW, "env": "cube-*", "hp": {"batch": 3}},
        {**ROW, "env": "maze-*", "hp": {"batch": 4}, "steps": 99},
        {**ROW, "algo": "other", "hp": {"batch": 5}},
    ]
    merged = merge_rows(rows, "mac", parse_env("cube-single-play-v0"), "paper")
    assert merged == {"hp": {"batch": 3, "chunk": 2}, "run": {}, "eval": {}, "data": {}, "steps": 10}


def test_environment_without_a_row_is_an_error():
    rows = [{**ROW, "env": "cube-*", "steps": 3}]
    cube, scene = parse_env("cube-single-play-v0"), parse_env("scene-play-v0")
    hparams.require_steps(merge_rows(rows, "mac", cube, "paper"), rows, "mac", cube, "paper")
    with pytest.raises(UserError, match=r"no row for --algo mac --env scene-play-v0 --preset paper"):
        hparams.require_steps(merge_rows(rows, "mac", scene, "paper"), rows, "mac", scene, "paper")


BAD_FILES = {
    "[[row]]\nhp = {batch = }": "line 2",
    "[[row]]\nhp = {batch = 1}": "row 1: `source` is missing",
    "[[row]]\nsource = 'x'\nhpp = {batch = 1}": "row 1: key 'hpp' is not known; did you mean 'hp'",
    "[[row]]\nsource = 'x'\n[[row]]\nsource = 'y'\nsteps = '9'": "row 2: steps = '9' must be a whole number",
    "[[row]]\nsource = 'x'\nhp = 3": "hp = 3 must be a table",
    "[[rows]]\nsource = 'x'": "key 'rows' is not known; did you mean 'row'",
    "[row]\nsource = 'x'": "[[row]]",
    "[[row]]\nsource = 'x'\nhp = {btch = 1}": "hp: key 'btch' is not known; did you mean 'batch'",
    "[[row]]\nsource = 'x'\nhp = {batch = '1'}": "hp: batch = '1' must be a whole number",
    "[[row]]\nsource = 'x'\nhp = {hidden = [8, 'a']}": "hidden = 'a' must be a whole number",
    "[[row]]\nsource = 'x'\nhp = {lr = true}": "lr = True must be a number",
    "[[row]]\nsource = 'x'\nhp = {batch = 0}": "batch=0: must be at least 1",
    "[[row]]\nsource = 'x'\neval = {engine = 'x'}": "engine = 'x' must be 'auto' or 'c' or 'mjx'",
}


@pytest.mark.parametrize("text", BAD_FILES)
def test_mistake_in_the_rows_is_named_in_one_line(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "hparams.toml"
    path.write_text(text)
    monkeypatch.setattr(hparams, "HPARAMS", path)
    monkeypatch.setattr(settings, "HPARAMS", path)
    message = message_of()
    assert BAD_FILES[text] in message
    assert str(path) in message


def test_missing_rows_file_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"gone\.toml"):
        load_rows(tmp_path / "gone.toml")


def test_shipped_rows_fit_their_algorithms():
    rows = load_rows(hparams.HPARAMS)
    for row in rows:
        presets = PRESETS[1:] if "preset" not in row else patterns(row, "preset")
        made_for = [
            (algo, env, preset)
            for algo, preset in itertools.product(REGISTRY, presets)
            if row_applies(row, algo, None, preset)
            for env in names()
            if row_applies(row, algo, parse_env(env), preset)
        ]
        assert made_for and set(presets) <= set(PRESETS), row
        for algo, env, preset in made_for[:: max(len(made_for) // 5, 1)]:
            build(REGISTRY[algo].config, merge_rows(rows, algo, parse_env(env), preset)["hp"], "hparams.toml")


def test_a_selector_may_be_a_list_of_patterns(tmp_path: Path):
    path = tmp_path / "hparams.toml"
    path.write_text("[[row]]\nsource = 'x'\nalgo = ['iql', 'i*ql']\nenv = ['cube-*', 'maze']\nsteps = 3")
    (row,) = load_rows(path)

    def env(name: str) -> TaskId:
        return parse_env("scene-play-v0")._replace(name=name, hparams_of=name)

    assert row_applies(row, "idql", env("cube-double-play-v0"), "paper") and row_applies(
        row, "iql", env("maze"), "laptop"
    )
    assert not row_applies(row, "fql", env("maze"), "paper") and not row_applies(
        row, "iql", env("mazes"), "paper"
    )
    for text in ("env = []", "env = [1]", "algo = 3"):
        path.write_text(f"[[row]]\nsource = 'x'\n{text}")
        with pytest.raises(UserError, match=r"row 1: (env|algo) = .* must be a text"):
            load_rows(path)


def test_environment_whose_rows_say_no_length_is_refused():
    argv = ("--algo", "iql", "--env", "antmaze-medium-navigate-singletask-v0", "--preset", "paper")
    message = message_of(*argv)
    for part in (*argv, "says how long to train", "humanoidmaze-medium-navigate", "take --preset laptop"):
        assert part in message
    assert settings_of(*argv[:-1], "laptop").steps == 20_000
    assert "only for *-v2" in message_of("--algo", "cql", "--preset", "paper")


# Saved settings.


def test_saved_settings_are_read_back_equal():
    argv = ("--hp.hidden", "8", "9", "--data.path", "some/file.npz", "--seed", "5", "--hp.lr", "1e-05")
    settings = settings_of("--preset", "laptop", *argv)
    text = json.dumps(settings.to_dict())
    assert settings_from_dict(json.loads(text), Config, "config.json") == settings
    without = settings_of("--preset", "laptop")
    assert without.data.path is None
    assert settings_from_dict(json.loads(json.dumps(without.to_dict())), Config, "config.json") == without


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run's folder as a launch leaves it at its start."""
    saved = settings_of("--preset", "laptop", "--seeds", "2", "--hp.batch", "9", "--hp.hidden", "8")
    (tmp_path / "config.json").write_text(json.dumps(saved.to_dict()))
    return tmp_path


def test_resume_without_other_flags_takes_the_saved_settings(run_folder: Path):
    settings = settings_of("--resume", "--out", str(run_folder))
    assert (settings.seeds, settings.hp.batch, settings.hp.hidden) == (2, 9, (8,))
    assert settings.to_dict() == json.loads((run_folder / "config.json").read_text())
    assert settings_of("--resume", "--out", str(run_folder), "--steps", "77").steps == 77


def test_auto_resume_continues_a_run_or_starts_one(run_folder: Path, tmp_path: Path):
    words = ("--auto-resume", "--seeds", "3", "--out")
    assert settings_of(*words, str(tmp_path / "new")).resume is False
    (tmp_path / "empty").mkdir()
    assert settings_of(*words, str(tmp_path / "empty")).resume is False
    settings = settings_of("--auto_resume", "--out", str(run_folder))
    assert settings.resume and settings.hp == settings_of("--resume", "--out", str(run_folder)).hp
    assert "--auto-resume needs --out DIR" in message_of("--auto-resume")


def test_resume_alone_takes_the_newest_run(run_folder: Path, monkeypatch: pytest.MonkeyPatch):
    (run_folder / "runs").mkdir()
    monkeypatch.chdir(run_folder)
    assert "no run in runs/" in message_of("--resume")
    (run_folder / "runs" / "a").mkdir()
    (run_folder / "config.json").rename(run_folder / "runs" / "a" / "config.json")
    (run_folder / "runs" / ".trash").mkdir()
    (run_folder / "runs" / ".trash" / "config.json").write_text("{}")
    settings = settings_of("--resume")
    assert settings.out == Path("runs/a") and settings.hp.batch == 9


@pytest.mark.parametrize(
    ("argv", "word"),
    [(("--preset", "paper"), "has laptop"), (("--env", "cube-double-play-singletask-v0"), "has cube-single")],
)
def test_resume_cannot_change_what_the_run_is(run_folder: Path, argv: tuple[str, ...], word: str):
    message = message_of("--resume", "--out", str(run_folder), *argv)
    assert argv[0] in message and word in message and str(run_folder) in message


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("{", "not JSON"),
        ("[]", "no settings"),
        ('{"algo": "mac", "env": "cube-single-play-singletask-task2-v0", "hp": {"btch": 1}}', "'batch'"),
        ('{"algo": "mac", "env": "cube-single-play-singletask-task2-v0", "stepz": 1}', "'steps'"),
        ('{"algo": "mac", "env": "cube-single-play-singletask-task2-v0", "run": 3}', "must be a table"),
        ('{"algo": "mac", "env": "cube-single-play-singletask-task2-v0", "steps": "many"}', "whole number"),
        ('{"algo": "sac", "env": "cube-single-play-singletask-task2-v0"}', "'sac'"),
        ("{}", "algo is missing"),
    ],
)
def test_damaged_saved_settings_are_named(run_folder: Path, content: str, part: str):
    (run_folder / "config.json").write_text(content)
    assert part in message_of("--resume", "--out", str(run_folder))


def test_keys_that_may_change_exist():
    plain = settings_of().to_dict()
    for key in MAY_DIFFER:
        *groups, name = key.split(".")
        assert name in (plain[groups[0]] if groups else plain)


@pytest.mark.parametrize("hint", [int, float, str, bool, tuple[int, ...], Path | None])
def test_convert_refuses_other_types(hint: Any):
    with pytest.raises(UserError, match="must be"):
        to_field_type({"a": 1}, hint, "here")


@pytest.mark.parametrize("algo", REGISTRY)
def test_a_run_without_later_options_fits_their_defaults(algo: str):
    """Whatever option came later: a run's configuration is read without it, and agrees with its default."""
    config = REGISTRY[algo].config
    new = settings_from_dict({"algo": algo, "env": "cube-single-play-singletask-task2-v0"}, config, "here")
    old = {name: {} if isinstance(value, dict) else value for name, value in new.to_dict().items()}
    assert settings_from_dict(old, config, "here") == new
    check_config(Path("run"), old, new.to_dict(), (), new.defaults)
    with pytest.raises(UserError, match=r"eval\.noise \(absent there, 0\.1 here\);"):
        noisy = dataclasses.replace(new, eval=EvalConfig(noise=0.1))
        check_config(Path("run"), old, noisy.to_dict(), (), noisy.defaults)


def test_changed_hyperparameter_does_not_fit_the_saved_run(run_folder: Path):
    settings = settings_of("--resume", "--out", str(run_folder), "--hp.batch", "10")
    saved = json.loads((run_folder / "config.json").read_text())
    with pytest.raises(UserError, match=r"hp\.batch \(9 there, 10 here\)"):
        check_config(run_folder, saved, settings.to_dict(), MAY_DIFFER)
