"""Learning weights and routers: the part of [`PeftEnsembleModel`] that sets what was fitted."""

from collections.abc import Mapping
from typing import Any

from ..._settings import check_options
from ..members import check_weights
from .collector import Rows
from .fitting import WeightFit, fit_ensemble, fit_router
from .router_fitting import RouterFit


class FittingMixin:
    """Weights and routers of [`PeftEnsembleModel`]."""

    def fit_weights(self, dataset: Mapping[str, Rows] | Rows, constraint: str = "simplex", **options: Any) -> WeightFit:
        """Learn the weights of each task, and default weights for all of them, on the adapters' outputs.

        [`fit_ensemble`] does the same without setting them, and describes the arguments.

        Args:
            dataset (`dict[str, Dataset]` or rows with a column `task`):
                Rows of token ids and labels, by task. Use rows that the adapters were not trained on.
            constraint (`str`, *optional*, defaults to `"simplex"`): `simplex`, `nonnegative` or `unconstrained`.
            options: `data_collator`, `batch_size`, `min_weight`, `max_values`, `max_rows`, `seed`, `mixed_precision`,
                `cross_validate` and `own_adapters`.

        Returns:
            [`WeightFit`]: the weights, with the losses of equal weights and of single adapters.

        Raises:
            `EnsembleError`: as [`fit_ensemble`]; the weights stay as they were.
            `ConfigurationError`: for other options.
        """
        check_options(fit_ensemble, options, "fit_weights", ("constraint",))
        fit = fit_ensemble(self, dataset, constraint, **options)
        weights = {**self.weights, **{task: fit.weights_of(fitted) for task, fitted in fit.tasks.items()}}
        default = fit.weights_of(fit.overall)
        check_weights({**weights, "default": default}, self.adapter_names)
        self.weights, self.default_weights = weights, default
        self.scales = {task: scale for task, scale in self.scales.items() if task not in fit.tasks} | fit.scales
        return fit

    def fit_router(self, dataset: Mapping[str, Rows] | Rows, **options: Any) -> RouterFit:
        """Learn weights for rows of unknown tasks from their prompts; `routing="hidden_states"` uses them.

        Args:
            dataset (`dict[str, Dataset]` or rows with a column `task`):
                Rows of token ids and labels, by task. Use rows that the adapters were not trained on.
            options: those of the function [`fit_router`], which fits without setting the router.

        Returns:
            [`RouterFit`]: the router, and the cross-validated losses that it was chosen by.

        Raises:
            `EnsembleError`: as the function [`fit_router`]; the router stays as it was.
            `ConfigurationError`: for other options.
        """
        check_options(fit_router, options, "fit_router", ())
        fit = fit_router(self, dataset, **options)
        self.router = fit.router
        return fit
