"""The jobs of a run's adapters, and the data that they are made of."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from functools import partial

from lorelei.algo.algorithm import PolicyAlgorithm
from lorelei.algo.preference import PreferenceAlgorithm
from lorelei.algo.sft import Sft
from lorelei.config.experiment import Experiment
from lorelei.config.run import RunConfig
from lorelei.data.chat import ChatTemplate
from lorelei.data.contract import PromptSource
from lorelei.data.examples import ExampleSource
from lorelei.data.pairs import ComparisonSource
from lorelei.data.source import make_comparisons, make_examples, make_source
from lorelei.env.contract import Endpoint, Env
from lorelei.env.environment import make_env
from lorelei.inference.contract import InferenceEngine
from lorelei.jobs.evaluation import EvaluationLog
from lorelei.jobs.job import Job
from lorelei.jobs.preference import PreferenceJob
from lorelei.jobs.rl import RlJob
from lorelei.jobs.sft import SftJob
from lorelei.model.config import ModelSizes
from lorelei.model.tokenizer import Tokenizer
from lorelei.obs.console import Console
from lorelei.publish.canary import Watched, fixed_tokens
from lorelei.reward.contract import NoReward, Unscored
from lorelei.reward.pool import make_pool
from lorelei.reward.trial import try_out
from lorelei.rollout.admission import Admission
from lorelei.rollout.collector import Collector
from lorelei.rollout.evaluate import Evaluator
from lorelei.rollout.meter import Meter
from lorelei.rollout.sampler import Policy
from lorelei.store.run import RunStore
from lorelei.store.spool import Spool
from lorelei.train.engine_thread import EngineThread
from lorelei.types import Ints, Prompt, SamplingParams

TRIALS = 3  # problems that a reward may fail on before it is refused


@dataclass(frozen=True, slots=True, kw_only=True)
class Problems:
    """What an adapter is rewarded for: its prompts, and what happens between one and its reward."""

    source: PromptSource
    held_out: list[Prompt]
    env: Env


Given = ExampleSource | ComparisonSource
Data = Problems | Given
READS_ANSWER = ("math_verify", "reasoning_gym")  # rewards that compare with a gold answer


@dataclass(frozen=True, slots=True, kw_only=True)
class DataMaker:
    """Reads and checks the data of a run's adapters, before anything heavy is loaded."""

    tokenizer: Tokenizer
    stop_token_ids: tuple[int, ...]
    model: ModelSizes
    max_context: int | None  # as configured
    stack: AsyncExitStack  # ends the workers of rewards

    @property
    def context(self) -> int:
        return self.model.context(self.max_context)

    def data(self, e: Experiment, endpoint: Endpoint | None) -> Data:
        """endpoint: what agents speak to. Raises ValueError for what a user can fix."""
        if e.algo.job != "rl":
            return self._given(e)
        source = make_source(
            e.task,
            self.tokenizer,
            e.seed,
            eval_size=e.eval_size,
            needs_answer=e.reward is not None and e.reward.kind in READS_ANSWER,
            own_tools=e.env.kind != "tools",
        )
        held_out = source.eval_prompts(e.eval.n_prompts) if e.eval.every else []
        self._check([source.prompt(0), *held_out])
        return Problems(source=source, held_out=held_out, env=self._env(e, endpoint, source))

    def _given(self, e: Experiment) -> Given:
        if isinstance(e.algo, PreferenceAlgorithm):
            make = partial(make_comparisons, paired=e.algo.paired)
        else:
            make = partial(make_examples, algo=e.algo if isinstance(e.algo, Sft) else None)
        source = make(
            e.task,
            self.tokenizer,
            e.seed,
            eval_size=e.eval_size,
            stop_token_ids=self.stop_token_ids,
            max_tokens=self.context,
        )
        source.evaluate_on(e.eval.n_prompts if e.eval.every else 0)
        first = source.example(0)
        self._check_vocabulary(first.id, first.tokens)
        return source

    def _env(self, e: Experiment, endpoint: Endpoint | None, source: PromptSource) -> Env:
        if e.reward is None:
            reward = Unscored()
        elif e.reward.kind == "env":
            reward = NoReward()
        else:
            reward = make_pool(e.reward)
            self.stack.callback(reward.close)
            if e.reward.trial:
                try_out(reward, (source.prompt(index).data for index in range(TRIALS)))
        return make_env(
            e.env,
            reward=reward,
            chat=ChatTemplate(
                tokenizer=self.tokenizer,
                stop_token_ids=self.stop_token_ids,
                variables=e.task.chat_template_kwargs,
                control_tokens=e.task.control_tokens,
            ),
            context=self.context,
            endpoint=endpoint,
            model=e.name,
        )

    def _check(self, prompts: Sequence[Prompt]) -> None:
        """A sample of the prompts; a longer one that comes later fails its own rollouts."""
        for prompt in prompts:
            self._check_vocabulary(f"the prompt {prompt.id}", prompt.tokens)
            if len(prompt.tokens) >= self.context:
                raised = self.context < self.model.max_positions
                raise ValueError(
                    f"task: the prompt of {prompt.id} has {len(prompt.tokens)} tokens and leaves "
                    f"no room to answer in a context of {self.context}; shorten such problems"
                    + (", or raise rollout.max_context" if raised else "")
                )

    def _check_vocabulary(self, what: str, tokens: Ints) -> None:
        if (largest := tokens.max()) >= self.model.vocab:
            raise ValueError(
                f"model: its tokenizer makes token {largest} of {what}, the model has "
                f"{self.model.vocab}; get the tokenizer files of this very model"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """What jobs that sample share: the engine, and how tokens become text."""

    engine: InferenceEngine
    decode: Callable[[Ints], str]
    stop_token_ids: tuple[int, ...]

    def policy(self, e: Experiment) -> Policy:
        """What an adapter's rollouts are sampled from."""
        sampling = SamplingParams(
            temperature=e.rollout.temperature,
            max_new_tokens=e.rollout.max_new_tokens,
            stop_token_ids=self.stop_token_ids,
            stop_strings=e.rollout.stop_strings,
            seed=e.seed,
        )
        return Policy(
            ref=None,
            sampling=sampling,
            stream=e.name,
            decode=self.decode,
            interruptible=e.rollout.interruptible,
        )

    def evaluator(self, e: Experiment, problems: Problems, meter: Meter) -> Evaluator:
        """What scores an adapter on its held-out problems."""
        policy = self.policy(e)
        sampling = replace(
            policy.sampling,
            temperature=e.eval.temperature,
            max_new_tokens=e.eval.max_new_tokens or e.rollout.max_new_tokens,
            top_k=e.eval.top_k,
            top_p=e.eval.top_p,
            min_p=e.eval.min_p,
        )
        return Evaluator(
            engine=self.engine,
            prompts=problems.held_out,
            env=problems.env,
            policy=replace(
                policy,
                sampling=sampling,
                stream=f"{e.name}/eval",
                interruptible=False,
                training=False,
            ),
            meter=meter,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class JobMaker:
    """Makes the jobs of a run's adapters."""

    config: RunConfig
    data: Mapping[str, Data]
    sampler: Sampler
    thread: EngineThread
    store: RunStore
    spool: Spool
    console: Console
    meter: Meter

    def job(self, e: Experiment) -> Job:
        """A job that has not begun."""
        data = self.data[e.name]
        evaluations = EvaluationLog(adapter=e.name, store=self.store, console=self.console)
        if isinstance(data, Given):
            return self._given(e, data, evaluations)
        assert isinstance(e.algo, PolicyAlgorithm), "its job is rl"
        prompts = data.held_out or map(data.source.prompt, itertools.count())
        evaluator = self.sampler.evaluator(e, data, self.meter) if e.eval.every else None
        return RlJob(
            experiment=e,
            algo=e.algo,
            collector=self._collector(e, e.algo, data),
            evaluator=evaluator,
            evaluations=evaluations,
            watched=self._watched(e, (prompt.tokens for prompt in prompts)),
            store=self.store,
        )

    def _given(self, e: Experiment, data: Given, evaluations: EvaluationLog) -> Job:
        examples = map(data.example, itertools.count())
        make = (
            partial(PreferenceJob, source=data, max_tokens=data.max_tokens)
            if isinstance(data, ComparisonSource)
            else partial(SftJob, source=data)
        )
        return make(
            experiment=e,
            algo=e.algo,
            thread=self.thread,
            evaluations=evaluations,
            watched=self._watched(e, (one.tokens for one in examples)),
        )

    def _watched(self, e: Experiment, sequences: Iterable[Ints]) -> Watched | None:
        canary = self.config.publish.canary
        if not canary.enabled:
            return None
        count = canary.tokens or (64 if self.config.dtype == "float32" else 512)
        return Watched(
            spec=e.lora.spec(),
            temperature=e.rollout.temperature,
            sequences=fixed_tokens(sequences, count),
        )

    def _collector(self, e: Experiment, algo: PolicyAlgorithm, problems: Problems) -> Collector:
        return Collector(
            experiment=e,
            algo=algo,
            source=problems.source,
            env=problems.env,
            policy=self.sampler.policy(e),
            admission=Admission(
                batch_size=algo.batch_size,
                max_staleness=e.rollout.max_head_offpolicyness,
                max_concurrent=e.max_concurrent,
                version=0,
                accepted=0,
            ),
            engine=self.sampler.engine,
            spool=self.spool,
            meter=self.meter,
        )
