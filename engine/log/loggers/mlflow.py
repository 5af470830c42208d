"""MLflow: ``pip install 'pfc[mlflow]'``; where it writes, says MLFLOW_TRACKING_URI or the option ``tracking_uri``."""

import math
import time

from ....data.errors import UsageError
from ...config.loading import flat
from ..hooks import Hook, RunInfo, Values, numbers

_LONGEST = 500  # characters of a parameter: more than any store refuses
_AT_ONCE = 100  # parameters in one request


class MLflow(Hook):
    """
    Args:
        experiment: name of the experiment, made if there is none.
        tracking_uri: of the server or store.
    """

    def __init__(self, experiment: str = "pfc", tracking_uri: str | None = None) -> None:
        try:
            from mlflow import MlflowClient
        except ImportError:
            raise UsageError("log.loggers: mlflow is not installed: pip install 'pfc[mlflow]'") from None
        self.new_client, self.uri, self.experiment = MlflowClient, tracking_uri, experiment

    def start(self, run: RunInfo) -> None:
        from mlflow.entities import Param

        self.client = self.new_client(self.uri)
        noted = run.directory / "mlflow.id"
        if run.resumed_step and noted.exists():
            self.id = noted.read_text(encoding="utf-8").strip()
            self.client.update_run(self.id, "RUNNING")
            return
        found = self.client.get_experiment_by_name(self.experiment)
        number = found.experiment_id if found is not None else self.client.create_experiment(self.experiment)
        self.id = self.client.create_run(number, run_name=run.directory.name).info.run_id
        noted.write_text(self.id, encoding="utf-8")
        parameters = [Param(key, str(value)[:_LONGEST]) for key, value in flat(run.config).items()]
        for begin in range(0, len(parameters), _AT_ONCE):
            self.client.log_batch(self.id, params=parameters[begin : begin + _AT_ONCE])

    def step(self, step: int, values: Values) -> None:
        self._log(step, values, "train/")

    def evaluation(self, step: int, values: Values) -> None:
        self._log(step, values, f"evaluation/{values.get('set', '')}/")

    def end(self, finished: bool) -> None:
        self.client.set_terminated(self.id, "FINISHED" if finished else "KILLED")

    def _log(self, step: int, values: Values, prefix: str) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        told = numbers(values).items()
        self.client.log_batch(
            self.id, metrics=[Metric(prefix + key, value, now, step) for key, value in told if math.isfinite(value)]
        )
