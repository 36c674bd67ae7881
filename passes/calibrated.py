"""Methods that run on a calibration plan: their option ``plan``, and the checks that it is this model's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, InstanceOf, PlainSerializer, WithJsonSchema, model_validator

from torchaccel.calibration.identity import SiteShape
from torchaccel.calibration.plan import CalibrationPlan, read_plan
from torchaccel.errors import CalibrationError

from .base import Method, MethodOptions, PassResult, RewriteContext

# Behind the path of a plan, the beginning of its digest: the plan as reports and ledgers name it.
PIN = "#sha256="
DIGITS = 16


def is_missing(value: Any) -> bool:
    """Whether an option names a plan by the path of a file that is not there."""
    return isinstance(value, (str, Path)) and not Path(str(value).partition(PIN)[0]).expanduser().is_file()


def load_plan(value: Any) -> Any:
    """The plan that an option names: a plan itself, or a path, which ``#sha256=<digest>`` may follow.

    Raises ``CalibrationError`` for a file that is no plan, or not the one of that digest. Anything else is returned.
    """
    if not isinstance(value, (str, Path)):
        return value
    path, _, digest = str(value).partition(PIN)
    plan = read_plan(path)
    if not plan.digest.startswith(digest):
        raise CalibrationError(
            f"asked for the calibration plan {path!r} with SHA-256 {digest}...; the file's is "
            f"{plan.digest[: len(digest)]}...; it was changed since, leave out {PIN}{digest} to use it all the same"
        )
    return plan


def plan_name(plan: CalibrationPlan) -> str:
    """The plan as an option that names it and no other."""
    return f"{plan.source}{PIN}{plan.digest[:DIGITS]}"


Plan = Annotated[
    InstanceOf[CalibrationPlan],
    BeforeValidator(load_plan),
    PlainSerializer(plan_name, return_type=str),
    WithJsonSchema({"type": "string", "description": "path of a calibration plan (torchaccel calibrate)"}),
]


class CalibratedOptions(MethodOptions):
    """plan: the path of a calibration plan, or a plan. decided: the options that it was made for: they are its, and to
    ask for others is an error."""

    plan: Plan | None = Field(default=None)

    decided: ClassVar[tuple[str, ...]] = ()

    @property
    def open_to_plan(self) -> bool:
        """Whether a plan may be added to what was asked for."""
        return self.plan is None

    @model_validator(mode="before")
    @classmethod
    def _of_the_plan(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("plan") is None:
            return given
        plan = load_plan(given["plan"])
        if not isinstance(plan, CalibrationPlan):
            return given
        for name in cls.decided:
            own = plan.options.get(name)
            if name in given and given[name] != own:
                raise ValueError(
                    f"{plan.described} was made with {name}={own!r}; found {name}={given[name]!r}. Leave it out, or "
                    "calibrate with it"
                )
        return given | {"plan": plan} | {name: plan.options[name] for name in cls.decided if name in plan.options}


class CalibratedMethod(Method):
    """A method with ``CalibratedOptions``; ``apply`` refuses plans of other methods and other models.

    lenders: methods whose plans say the same.
    """

    Options: ClassVar[type[CalibratedOptions]]
    lenders: ClassVar[tuple[str, ...]] = ()

    options: CalibratedOptions

    def __init__(self, options: CalibratedOptions):
        """Raises ``CalibrationError`` for the plan of another method."""
        super().__init__(options)
        if options.plan is not None and options.plan.method not in (self.name, *self.lenders):
            raise CalibrationError(
                f"asked for method {self.name!r} with {options.plan.described}; a plan is for the method it was made "
                f"for. {command(self)}"
            )

    @property
    def lacks_plan(self) -> bool:
        """Whether the method cannot run as it is, for want of a plan."""
        return self.calibration == "required" and self.options.plan is None

    def apply(self, context: RewriteContext) -> PassResult:
        """Check the plan against the graph's model, then rewrite; raises ``CalibrationError`` for another model's."""
        plan = self.options.plan
        if self.lacks_plan:
            raise missing_plan(self)
        if plan is not None:
            sites = [SiteShape(site.heads, site.kv_heads, site.head_dim) for site in context.anatomy.attentions]
            plan.model.check_sites(sites, plan.described)
            plan.model.check_weights(context.parameters, plan.described)
        return super().apply(context)


def needs_plan(method: Method) -> bool:
    """Whether a method cannot run as it is, for want of a plan."""
    return isinstance(method, CalibratedMethod) and method.lacks_plan


def missing_plan(method: Method) -> CalibrationError:
    """The error for a method that cannot run without a plan."""
    return CalibrationError(f"method {method.name!r} needs a calibration plan and was given none. {command(method)}")


def command(method: Method) -> str:
    """What to do for a plan, in words."""
    return (
        f"Make one with: torchaccel calibrate --method {method.name} --model MODEL --text FILE_OR_FOLDER -o "
        f'plan.safetensors, and give it as {{"method": "{method.name}", "plan": "plan.safetensors"}}'
    )
