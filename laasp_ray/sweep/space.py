"""A search over further settings beside the target: what may be chosen, and who chooses.

A space is a mapping from dotted config keys to one of

    {"choice": [a, b, ...]}   {"uniform": [low, high]}   {"loguniform": [low, high]}   {"int": [low, high]}

where the bounds belong to it. A Python file may use Ray Tune's own (tune.choice, tune.uniform, ...). Optuna's
tree-structured Parzen estimator chooses, for each target on its own: accuracies at different targets do not compare.
"""

from __future__ import annotations

import json
import math
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laasp_ray.config import RunConfig
from laasp_ray.config.compat import value_at
from laasp_ray.data.ordering import derive_seed
from laasp_ray.errors import ConfigError
from laasp_ray.store.journal import started_config
from laasp_ray.sweep.directors import Director, Record
from laasp_ray.sweep.goals import SpaceSearch, checked_targets, inside
from laasp_ray.sweep.trials import Outcome, Trial, folder_of, is_finished, outcome_of

if TYPE_CHECKING:
    import optuna

Space = Mapping[str, Mapping[str, Any]]
_KINDS = ("choice", "uniform", "loguniform", "int")
_FIXED = ("name", "storage", "seed", "cluster", "prune.flops_reduction", "prune.method")


def read_space(path: str | Path) -> dict[str, dict[str, Any]]:
    """The space in a YAML file, or in `SPACE` of a Python file, which is run. Raises ConfigError, saying why."""
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"--space {file}: there is no such file")
    found = _from_python(file) if file.suffix == ".py" else _from_yaml(file)
    if not isinstance(found, Mapping) or not found:
        raise ConfigError(
            f"--space {file} must map keys to what may be chosen, such as prune.step: {{uniform: [0.01, 0.05]}}"
        )
    return {str(key): checked_entry(str(key), entry) for key, entry in found.items()}


def _from_yaml(file: Path) -> Any:
    import yaml  # type: ignore[import-untyped]

    try:
        return yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--space {file} is no YAML: {error}") from error


def _from_python(file: Path) -> Any:
    try:
        names = runpy.run_path(str(file))
    except Exception as error:
        raise ConfigError(f"--space {file} cannot be run: {type(error).__name__}: {error}") from error
    if "SPACE" not in names:
        raise ConfigError(f"--space {file} must assign SPACE, a mapping from config keys to what may be chosen")
    found = names["SPACE"]
    return {key: _of_tune(key, entry) for key, entry in found.items()} if isinstance(found, Mapping) else found


def _of_tune(key: str, entry: Any) -> Any:
    """The plain form of one of Ray Tune's domains; what is plain already is left."""
    if isinstance(entry, Mapping):
        return entry
    kind = type(entry).__name__
    sampler = type(entry.get_sampler()).__name__.strip("_") if hasattr(entry, "get_sampler") else ""
    if kind == "Categorical":
        return {"choice": list(entry.categories)}
    if kind == "Float" and sampler in ("Uniform", "LogUniform"):
        return {sampler.lower(): [entry.lower, entry.upper]}
    if kind == "Integer" and sampler == "Uniform":
        return {"int": [entry.lower, entry.upper - 1]}  # Tune's upper bound does not belong to it
    raise ConfigError(f"the space has {entry!r} for {key}: of Ray Tune, give choice, uniform, loguniform or randint")


def checked_entry(key: str, entry: Any) -> dict[str, Any]:
    """One entry of a space. Raises ConfigError, naming the key, if it is none."""
    if not isinstance(entry, Mapping) or len(entry) != 1 or next(iter(entry)) not in _KINDS:
        raise ConfigError(f"the space has {entry!r} for {key}: give one of {', '.join(_KINDS)} with a list")
    ((kind, values),) = entry.items()
    if not isinstance(values, list | tuple) or not values:
        raise ConfigError(f"the space has {kind}: {values!r} for {key}: give a list")
    if kind != "choice":
        wanted = int if kind == "int" else (int, float)
        numbers = all(isinstance(value, wanted) and not isinstance(value, bool) for value in values)
        if len(values) != 2 or not numbers or not values[0] < values[1] or (kind == "loguniform" and values[0] <= 0):
            raise ConfigError(f"the space has {kind}: {list(values)} for {key}: give [low, high], low below high")
    try:
        return {kind: json.loads(json.dumps(values))}  # as the journal has it
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the space has {kind}: {values!r} for {key}: give plain values ({error})") from error


def check_space(space: Space, config: RunConfig) -> None:
    """Raises ConfigError for a key that a run of `config` does not have or that a sweep sets itself, and for a value
    that the key does not take.
    """
    for key, entry in space.items():
        if key in _FIXED or key.partition(".")[0] in ("cluster", "model", "data"):
            raise ConfigError(f"the space has {key}, which is the same for all trials: set it with --set")
        ((kind, values),) = entry.items()
        for value in values:
            with_settings(config, {key: value})
        if kind in ("uniform", "loguniform"):
            try:
                with_settings(config, {key: values[0] + (values[1] - values[0]) / math.pi})
            except ConfigError as error:
                raise ConfigError(
                    f"the space has {kind}: {list(values)} for {key}, which does not take what lies between ({error}); "
                    "for whole numbers give int: [low, high]"
                ) from error


def with_settings(config: RunConfig, settings: Mapping[str, Any]) -> RunConfig:
    """`config` with other values for dotted keys. Raises ConfigError naming a key that is unknown or does not fit."""
    plain = config.to_dict()
    for key, value in settings.items():
        section, _, name = key.rpartition(".")
        there = plain if not section else plain.get(section)
        if not isinstance(there, dict) or name not in there:
            raise ConfigError(f"the space has {key}, which is no key of this run; jobs/prune.py --help lists them")
        there[name] = value
    return RunConfig.from_dict(plain)


class SpaceDirector(Director):
    """Trials of each target by turns, with settings that Optuna chooses for that target."""

    def __init__(self, config: RunConfig, goal: SpaceSearch, record: Record, earlier: Mapping[str, Outcome]) -> None:
        super().__init__(record)
        check_space(goal.space, config)
        self._config, self._goal = config, goal
        targets = checked_targets(goal.flops_reductions)
        self._studies = {target: Study(goal.space) for target in targets}
        self._slots = [(target, number) for number in range(1, goal.trials + 1) for target in targets]
        self._settings: dict[str, dict[str, Any]] = {}
        self._of: dict[str, tuple[float, Any]] = {}
        left = []
        for target, number in self._slots:
            name = _name(target, number)
            theirs = started_config(folder_of(inside(config, name)))
            if theirs is None:
                left.append((target, number))
                continue
            settings = {key: value_at(theirs, key) for key in goal.space}
            run = self._run(target, name, settings)
            if is_finished(run):
                score = outcome_of(run).score
                assert score is not None
                self._studies[target].add(settings, score)
            else:
                left.append((target, number))
        self._left = left

    def settings_of(self, name: str) -> Mapping[str, Any]:
        return self._settings.get(name, {})

    def _run(self, target: float, name: str, settings: Mapping[str, Any]) -> RunConfig:
        run = inside(with_settings(self._config, settings), name, flops_reduction=target)
        self._settings[name] = dict(settings)
        if run not in self.trials:
            self.trials.append(run)
        return run

    def _next(self) -> Trial | None:
        if not self._left:
            return None
        target, number = self._left.pop(0)
        name = _name(target, number)
        study = self._studies[target]
        if name in self._settings:  # it has begun before the sweep was cut off
            settings, asked = self._settings[name], None
        else:
            settings, asked = study.ask(derive_seed(self._config.seed, f"space {name}") % 2**32)
        self._of[name] = target, asked
        return Trial(config=self._run(target, name, settings))

    def _ended(self, name: str, outcome: Outcome) -> None:
        target, asked = self._of.pop(name)
        self._studies[target].tell(asked, self._settings[name], outcome.score)

    @property
    def is_done(self) -> bool:
        return not self._left


class Study:
    """Optuna's choices for one target."""

    def __init__(self, space: Space) -> None:
        try:
            import optuna
        except ImportError as error:
            raise ConfigError("a search over a space needs Optuna: pip install 'laasp_ray[space]'") from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._distributions = {key: _distribution(entry) for key, entry in space.items()}
        self._choices = {key: entry["choice"] for key, entry in space.items() if "choice" in entry}
        self._study = optuna.create_study(direction="maximize")

    def ask(self, seed: int) -> tuple[dict[str, Any], optuna.trial.Trial]:
        """Settings to try, and Optuna's trial of them. They follow from the seed and from the results of other trials,
        whichever session had them.
        """
        import optuna

        self._study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True, n_startup_trials=5)
        trial = self._study.ask(self._distributions)
        return {key: self._value(key, value) for key, value in trial.params.items()}, trial

    def tell(self, asked: optuna.trial.Trial | None, settings: Mapping[str, Any], score: float | None) -> None:
        """What came of a trial, %; None: nothing. `asked` is None for one that an earlier session asked for."""
        import optuna

        if asked is not None:
            state = optuna.trial.TrialState.FAIL if score is None else None
            self._study.tell(asked, score, state=state)
        elif score is not None:
            self.add(settings, score)

    def add(self, settings: Mapping[str, Any], score: float) -> None:
        """A trial of an earlier session."""
        import optuna

        params = {
            key: _index(self._choices[key], value) if key in self._choices else value for key, value in settings.items()
        }
        self._study.add_trial(optuna.trial.create_trial(params=params, distributions=self._distributions, value=score))

    def _value(self, key: str, value: Any) -> Any:
        return self._choices[key][value] if key in self._choices else value


def _distribution(entry: Mapping[str, Any]) -> Any:
    from optuna import distributions

    ((kind, values),) = entry.items()
    if kind == "choice":  # by position, since Optuna takes no lists as choices
        return distributions.CategoricalDistribution(list(range(len(values))))
    if kind == "int":
        return distributions.IntDistribution(*values)
    low, high = map(float, values)
    return distributions.FloatDistribution(low, high, log=kind == "loguniform")


def _index(choices: list[Any], value: Any) -> int:
    return next(number for number, choice in enumerate(choices) if choice == value)


def _name(target: float, number: int) -> str:
    return f"flops-{target:.10g}-t{number:02d}"
