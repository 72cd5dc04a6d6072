"""The validity checks that every record must pass before a figure of it counts.

Each says what it found and what it needs. A check that does not apply (no such arm, no speed reported) is
skipped and says why. One that fails makes the run invalid.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from math import ceil, exp, isfinite, log, sqrt
from statistics import median

from harness.errors import UserError
from harness.judge.judgement import CheckOutcome, CheckStatus
from harness.judge.limits import limits_outcome, run_shares
from harness.judge.parity import parity_report, rejection_pairs, replay_differences, steps_known
from harness.judge.step_costs import (
    Paired,
    bandwidth_share,
    decoded_over_apart,
    num_nodes,
    own_part_s,
    paired,
    priced,
    processor_shares,
    steps_over,
)
from harness.judge.totals import timed_generations
from harness.records.run import RunRecord, planned_trials
from harness.records.trace import Trace
from harness.records.trials import Generation, TrialKey
from harness.specs.suite import ArmSpec, BackboneName, is_deterministic

Check = Callable[[RunRecord], CheckOutcome]

TOKENS_PER_TIE = 10_000  # at most 1 tie in 10,000 tokens, rounded up: float32 rounding makes fewer
MAX_EOS_IDS = 4  # chat models have one to three; more means that ordinary tokens were taken for ends
STANDARD_ERRORS_OVER_RANDOM = 3.0
MAX_LOAD_PER_CORE = 1.5  # our own threads make at most 1; a competitor that takes all cores makes it 2
# A step cannot read faster than the device; the 10 % are for the spread of the bandwidth benchmark.
MAX_BANDWIDTH_SHARE = 1.1
# Decoding and separate steps of one block agree within 5 % and three standard errors, whatever the noise, up
# to half as much again. Committed records on CPUs: 0.95 to 1.08; quiet ones 0.98 to 1.00.
MAX_APART, LARGEST_APART = 0.05, log(1.5)
# Separate steps on a GPU wait for it at the ends of every part, which decoding does not: 0.85 to 0.94.
MAX_WAITS_APART = 0.2
# A step over the price of its size in `step_costs`, at another time and context: 0.72 to 1.16.
PRICED_STEPS = (0.6, 1.5)
MAX_CONTEXT_OVER_PRICED = 3.0  # longer texts have longer attention than the priced steps
# What a step takes on top of its backbone, over its price (0.92 to 1.43) and over the profile (0.88 to 1.11).
# The heads are 57 to 80 % of it on a CPU.
MIN_OWN_PART = 0.7
# What no part of a step's profile explains: 0.15 to 0.5 % on a CPU, 0.12 to 0.4 ms on a GPU; the clock itself
# rounds.
MAX_UNEXPLAINED_SHARE, MAX_UNEXPLAINED_S, CLOCK_ROUNDING = 0.02, 0.0005, 0.001
# One node without heads is the least work there is: 0.58 to 0.92 of the cheapest Medusa step.
MAX_VANILLA_OVER_MEDUSA = 1.1
# `generate` does the same work with more Python around it: vanilla takes 0.12 to 0.70 of its step.
MAX_VANILLA_OVER_GENERATE = 1.1
# A thread has all that the load that `machine_quiet` allows leaves; an arm waits like its baseline.
MIN_PROCESSOR_SHARE, MAX_MORE_WAITING = 1 / MAX_LOAD_PER_CORE, 0.015
NOISE_ERRORS = 3.0  # standard errors that are noise: one sound arm in 700 lies further off
SEALED_FILES = ("suite.toml", "environment.json", "trees.json", "generations.jsonl")


def trials_complete(record: RunRecord) -> CheckOutcome:
    """Check that every arm has an outcome for every prompt, round and seed, and the manifest counts all."""
    trials = {outcome.trial for outcome in record.outcomes}
    prompts = sorted({trial.prompt_key for trial in trials})
    planned = planned_trials(record.suite, prompts)
    counted = record.manifest.num_planned if record.manifest is not None else 0
    missing, strange = sorted(map(_name, planned - trials)), sorted(map(_name, trials - planned))
    found = f"{len(trials)} trials with an outcome"
    found += _first(", missing", missing) + _first(", not planned", strange)
    found += _first(", a second outcome of a trial on line", [str(number) for number in record.repeated])
    is_whole = bool(trials) and not missing and not strange and counted == len(planned)
    is_whole = is_whole and not record.repeated
    return _outcome(
        "trials_complete",
        is_whole,
        found=found,
        need=f"the {counted} of the manifest, {len(planned)} of the suite",
    )


def no_failures(record: RunRecord) -> CheckOutcome:
    """Check that no trial is left failed."""
    failures = [f"{_name(failure.trial)}: {failure.error_type}" for failure in record.failures]
    return _none_wrong(
        "no_failures", failures, checked=f"{len(record.outcomes)} outcomes", need="no failed trial"
    )


def seal_intact(record: RunRecord) -> CheckOutcome:
    """Check that the manifest is there, lists the files that matter, and every hash agrees."""
    need = "a manifest whose SHA-256 agree with every file"
    try:
        record.check_seal()
    except UserError as error:
        return _outcome("seal_intact", False, found=f"{error.found} in {error.where}", need=need)
    sealed = record.manifest.sha256 if record.manifest is not None else {}
    unsealed = [name for name in SEALED_FILES if name not in sealed]
    return _outcome(
        "seal_intact",
        not unsealed,
        found=f"{len(sealed)} sealed files" + _first(", not sealed", unsealed),
        need=need,
    )


def token_counts(record: RunRecord) -> CheckOutcome:
    """Check that the tokens and times of the steps add up.

    Every step keeps at least one token, all of them keep n - 1 and have one time each, and n lies within the
    budget.
    """
    budget = record.suite.max_new_tokens

    def is_wrong(generation: Generation) -> bool:
        steps = generation.step_tokens
        return (
            sum(steps) != generation.num_tokens - 1
            or any(kept < 1 for kept in steps)
            or len(generation.step_times_s) != len(steps)
            or not 1 <= generation.num_tokens <= budget
        )

    wrong = [_name(generation.trial) for generation in _generations(record) if is_wrong(generation)]
    need = f"steps of at least 1 token that sum to n - 1, a time each, n <= {budget}"
    return _none_wrong("token_counts", wrong, checked=f"{len(_generations(record))} generations", need=need)


def stop_rule(record: RunRecord) -> CheckOutcome:
    """Check that a generation ends at end-of-sequence or at the budget, and nowhere goes past its end.

    The end-of-sequence ids are the last ids of the generations that say they ended so.
    """
    generations = _generations(record)
    ends = {
        generation.token_ids[-1]
        for generation in generations
        if generation.ended_by == "eos" and generation.token_ids
    }

    def is_wrong(generation: Generation) -> bool:
        *inner, last = generation.token_ids or (-1,)
        if ends.intersection(inner):
            return True
        return generation.ended_by == "budget" and (
            last in ends or generation.num_tokens != record.suite.max_new_tokens
        )

    wrong = [_name(generation.trial) for generation in generations if is_wrong(generation)]
    found = f"{len(generations)} generations, {len(ends)} end-of-sequence ids" + _first(", wrong", wrong)
    need = f"end-of-sequence last or {record.suite.max_new_tokens} tokens, at most {MAX_EOS_IDS} such ids"
    return _outcome("stop_rule", not wrong and len(ends) <= MAX_EOS_IDS, found=found, need=need)


def vanilla_steps(record: RunRecord) -> CheckOutcome:
    """Check that vanilla takes n - 1 steps: one token each, and the prefill yields the first."""
    generations = _of_arms(record, lambda arm: arm.method == "vanilla")
    wrong = [
        _name(generation.trial)
        for generation in generations
        if generation.num_steps != generation.num_tokens - 1
    ]
    return _none_wrong(
        "vanilla_steps",
        wrong,
        checked=f"{len(generations)} vanilla generations",
        need="n - 1 steps for n tokens",
    )


def equal_prompts(record: RunRecord) -> CheckOutcome:
    """Check that all arms decode the same prompts: same keys, numbers of prompt tokens and categories."""
    seen = {
        arm.name: {_prompt(generation) for generation in _generations(record, arm=arm.name)}
        for arm in record.suite.arms
    }
    reference = next(iter(seen.values()), set())
    different = [arm for arm, prompts in seen.items() if prompts != reference]
    found = f"{len(reference)} prompts in {len(seen)} arms" + _first(", others in", different)
    return _outcome(
        "equal_prompts", bool(reference) and not different, found=found, need="the same prompts in every arm"
    )


def equal_budgets(record: RunRecord) -> CheckOutcome:
    """Check that every generation that the budget ended has as many tokens as any other.

    The trace counts as one more generation.
    """
    lengths = {
        generation.num_tokens for generation in _generations(record) if generation.ended_by == "budget"
    }
    lengths |= {trace.provenance.max_new_tokens for trace in _traces(record).values() if trace is not None}
    found, need = f"budgets of {sorted(lengths)} tokens", f"{record.suite.max_new_tokens} tokens in every arm"
    return _outcome("equal_budgets", lengths <= {record.suite.max_new_tokens}, found=found, need=need)


def greedy_parity(record: RunRecord) -> CheckOutcome:
    """Check that greedy arms yield their baseline's tokens, but for shown ties.

    Float32 allows few ties; half precision as many as its rounding makes. A tie of the baseline's text shows
    in every arm, so positions and tokens are counted once, not once an arm.
    """
    report = parity_report(record)
    references = {
        arm.baseline for arm in record.suite.arms if is_deterministic(arm) and arm.baseline is not None
    }
    texts = {
        (row.trial.arm, row.trial.prompt_key): row.num_tokens
        for row in _generations(record)
        if row.trial.arm in references
    }
    num_tokens = sum(texts.values())
    if not report.num_compared:
        return _skipped("greedy_parity", "no greedy arm with a baseline")
    ties = len({(row.prompt_key, row.position) for row in report.divergences if row.kind == "tie"})
    bugs = [
        f"{row.arm} {row.prompt_key} at {row.position}" for row in report.divergences if row.kind == "bug"
    ]
    found = (
        f"{report.num_identical} of {report.num_compared} identical, texts differ at {ties} ties in "
        f"{num_tokens:,} tokens"
    )
    found += _first(f", {len(bugs)} bugs", bugs)
    dtype, rounding = record.environment.dtype, report.rounding
    if rounding is not None:
        found += (
            f"; {dtype} texts are equal only up to ties, {rounding.num_equal_tokens:,} tokens over all arms; "
            f"rounding moved gaps by {rounding.largest_shift:.3g}, and {rounding.share_below:.0%} of the "
            f"positions have a gap below {rounding.tie_margin:.3g}"
        )
        return _outcome(
            "greedy_parity",
            not bugs,
            found=found,
            need=f"no difference other than at a gap below {rounding.tie_margin:.3g}",
        )
    if dtype != "float32":
        return _skipped("greedy_parity", f"{found}; {dtype}, whose rounding is not measured here")
    allowed = ceil(num_tokens / TOKENS_PER_TIE)
    return _outcome(
        "greedy_parity",
        not bugs and ties <= allowed,
        found=found,
        need=f"no bug, at most {allowed} {'tie' if allowed == 1 else 'ties'}",
    )


def sampled_parity(record: RunRecord) -> CheckOutcome:
    """Check that rejection sampling yields the tokens of its baseline, sampled with the same seed.

    They part only where rounding decides a draw, which is as rare as a tie.
    """
    pairs = rejection_pairs(record)
    if isinstance(pairs, str):
        return _skipped("sampled_parity", pairs)
    allowed = pairs.num_tokens // TOKENS_PER_TIE  # no whole text is one tie: rounded down
    parted = [_name(trial) for trial in pairs.parted]
    return _outcome(
        "sampled_parity",
        len(parted) <= allowed,
        found=f"{pairs.num_texts - len(parted)} of {pairs.num_texts} identical" + _first(", other", parted),
        need=f"the tokens of sampled vanilla, at most {allowed} parted by rounding",
    )


def replay_equals_decode(record: RunRecord) -> CheckOutcome:
    """Check that replaying the trace gives every greedy Medusa generation's steps.

    Shown ties are excused and, between them, ranks that rounding moved.
    """
    generations = _of_arms(record, lambda arm: arm.method == "medusa" and is_deterministic(arm))
    if not generations:
        return _skipped("replay_equals_decode", "no greedy Medusa arm")
    traces = _traces(record)
    backbone_of = {arm.name: arm.backbone for arm in record.suite.arms}
    if missing := {
        backbone_of[generation.trial.arm]
        for generation in generations
        if traces[backbone_of[generation.trial.arm]] is None
    }:
        found = f"no trace of the {' or the '.join(sorted(missing))} backbone"
        return _outcome(
            "replay_equals_decode", False, found=found, need="the trace of the greedy vanilla generations"
        )
    differences = replay_differences(record)
    traced = {
        (backbone, prompt.key)
        for backbone, trace in traces.items()
        if trace is not None
        for prompt in trace.prompts
    }
    bugs = [f"{row.arm} {row.prompt_key} at {row.position}" for row in differences if row.kind == "bug"]
    untraced = [
        row for row in generations if (backbone_of[row.trial.arm], row.trial.prompt_key) not in traced
    ]
    bugs += [f"{_name(generation.trial)} has no trace" for generation in untraced]
    found = f"{len(generations)} generations, {len(differences)} with other steps than replayed" + _first(
        ", unexplained", bugs
    )
    if (dtype := record.environment.dtype) != "float32":
        if any(record.rounding_of(backbone) is None for backbone in record.suite.backbones):
            return _skipped("replay_equals_decode", f"{found}; {dtype}, where replay is an approximation")
        num_steps, num_known = steps_known(record)
        found += (
            f"; {dtype}, {num_steps:,} steps before the texts differ, and in {num_known:,} of them rounding "
            "leaves one length only"
        )
    return _outcome("replay_equals_decode", not bugs, found=found, need="the replayed steps, or a shown tie")


def heads_beat_random(record: RunRecord) -> CheckOutcome:
    """Check that every trained head is right more often than a random one on held-out text.

    The first head must be so by three standard errors.
    """
    need = f"every head above random, the first by {STANDARD_ERRORS_OVER_RANDOM:.0f} standard errors"
    if all(arm.method != "medusa" for arm in record.suite.arms):
        return _skipped("heads_beat_random", "no Medusa arm")
    told, is_better = [], True
    for backbone in record.suite.backbones:
        control = record.heads_control_of(backbone)
        if (
            control is None
            or not control.num_positions
            or not 0 < len(control.trained_top1) == len(control.random_top1)
        ):
            return _outcome(
                "heads_beat_random",
                False,
                found=f"no control of the heads of the {backbone} backbone",
                need=need,
            )
        pairs = list(zip(control.trained_top1, control.random_top1, strict=True))
        error = sqrt(sum(share * (1 - share) for share in pairs[0]) / control.num_positions)
        is_better &= all(trained > random for trained, random in pairs)
        is_better &= pairs[0][0] - pairs[0][1] >= STANDARD_ERRORS_OVER_RANDOM * error
        shares = ", ".join(f"{trained:.3f} over {random:.3f}" for trained, random in pairs)
        told.append(
            f"{'' if backbone == 'original' else f'{backbone}: '}{shares} at {control.num_positions} "
            "positions"
        )
    return _outcome("heads_beat_random", is_better, found="; ".join(told), need=need)


def repeats_agree(record: RunRecord) -> CheckOutcome:
    """Check that a greedy arm gives the same tokens whenever it decodes the same prompt.

    That holds in every round and in every attempt.
    """
    texts: dict[tuple[str, str], list[tuple[int, ...]]] = defaultdict(list)
    for generation in _attempts(record):
        texts[generation.trial.arm, generation.trial.prompt_key].append(generation.token_ids)
    deterministic = {arm.name for arm in record.suite.arms if is_deterministic(arm)}
    repeated = {key: ids for key, ids in texts.items() if key[0] in deterministic and len(ids) > 1}
    if not repeated:
        return _skipped("repeats_agree", "no greedy trial was repeated")
    wrong = [" ".join(key) for key, ids in repeated.items() if len(set(ids)) > 1]
    return _none_wrong(
        "repeats_agree", wrong, checked=f"{len(repeated)} repeated trials", need="the same tokens every time"
    )


def seeds_matter(record: RunRecord) -> CheckOutcome:
    """Check that the seeds of a sampling arm give different texts on at least one prompt."""
    sampling = [arm.name for arm in record.suite.arms if len(arm.seeds) > 1]
    if not sampling:
        return _skipped("seeds_matter", "no arm with several seeds")
    idle = [arm for arm in sampling if not _seeds_differ(_generations(record, arm=arm))]
    return _none_wrong(
        "seeds_matter",
        idle,
        checked=f"{len(sampling)} sampling arms",
        need="seeds that change the text of some prompt",
    )


def acceptance_within_tree(record: RunRecord) -> CheckOutcome:
    """Check that no step keeps more tokens than the longest path of the arm's tree, root counted."""
    arms = [arm for arm in record.suite.arms if arm.method == "medusa"]
    if not arms:
        return _skipped("acceptance_within_tree", "no Medusa arm")
    wrong = []
    for arm in arms:
        depth = record.trees[arm.name].tree().depth if arm.name in record.trees else 0
        longest = max(
            (max(generation.step_tokens, default=1) for generation in _generations(record, arm=arm.name)),
            default=1,
        )
        limit = 1 + min(depth, arm.num_heads or depth)
        if longest > limit:
            wrong.append(f"{arm.name} keeps {longest} of {limit}")
    return _none_wrong(
        "acceptance_within_tree", wrong, checked=f"{len(arms)} trees", need="at most depth + 1 tokens a step"
    )


def timings_valid(record: RunRecord) -> CheckOutcome:
    """Check that every time is positive and finite, and that every trial has a timing that counts.

    Timings that are marked invalid are left out.
    """
    if not record.reports_speed:
        return _skipped("timings_valid", "the suite reports no speed")
    generations = _generations(record)
    unusable = [one.trial for one in generations if not one.timing_valid or not _times_positive(one)]
    excluded = sum(not generation.timing_valid for generation in _attempts(record))
    found = f"{len(generations)} generations, {excluded} timings left out" + _first(
        ", unusable", map(_name, unusable)
    )
    return _outcome(
        "timings_valid",
        bool(generations) and not unusable,
        found=found,
        need="a valid timing of positive times for every trial",
    )


def machine_quiet(record: RunRecord) -> CheckOutcome:
    """Check that enough prompts have a block that nothing disturbed: all speeds come from those.

    Records from before the rule on disturbance tell the load average alone; its median must stay within a
    generous bound.
    """
    rule = record.suite.disturbance
    if not record.reports_speed:
        return _skipped("machine_quiet", "the suite reports no speed")
    if rule is None:
        return _loaded_little(record)
    prompts, needed = {one.prompt_key for one in record.tries}, record.num_quiet_needed
    reasons = [words for one in record.tries for words in one.disturbances]
    num_disturbed = sum(bool(one.disturbances) for one in record.tries)
    num_quiet = len(record.quiet_prompts)
    found = f"{num_quiet} of {len(prompts)} prompts with a quiet block, {num_disturbed} blocks disturbed"
    return _outcome(
        "machine_quiet",
        num_quiet >= needed,
        found=found + _first(", by", reasons),
        need=f"{needed} prompts with one",
    )


def _loaded_little(record: RunRecord) -> CheckOutcome:
    """Return whether the median load average lay within its bound."""
    loads = [
        generation.load_average for generation in _generations(record) if generation.load_average is not None
    ]
    if not loads:
        return _skipped("machine_quiet", "no load was recorded")
    device = record.environment.device
    found = (
        f"median load {median(loads):.1f} (highest {max(loads):.1f}) on {device.num_cores} cores "
        f"with {device.num_threads} threads"
    )
    bound = MAX_LOAD_PER_CORE * device.num_cores
    return _outcome(
        "machine_quiet", median(loads) <= bound, found=found, need=f"a median of at most {bound:.1f}"
    )


def arms_interleaved(record: RunRecord) -> CheckOutcome:
    """Check that all arms decode one prompt before any decodes the next, in changing order."""
    if not record.reports_speed:
        return _skipped("arms_interleaved", "the suite reports no speed")
    blocks: dict[tuple[int, str], list[Generation]] = defaultdict(list)
    for generation in _generations(record):
        blocks[generation.trial.round, generation.trial.prompt_key].append(generation)
    if len(blocks) < 2 or len(record.suite.arms) < 2:
        return _skipped("arms_interleaved", "one block or one arm")
    ranges = sorted((rows[0].order, rows[-1].order) for rows in blocks.values())
    apart = all(before[1] < after[0] for before, after in pairwise(ranges))
    orders = {tuple((row.trial.arm, row.trial.seed) for row in rows) for rows in blocks.values()}
    found = (
        f"{len(blocks)} blocks {'one after another' if apart else 'that overlap'} in {len(orders)} "
        "orders of arms"
    )
    return _outcome(
        "arms_interleaved",
        apart and len(orders) > 1,
        found=found,
        need="blocks one after another, in more than one order",
    )


def provenance_agrees(record: RunRecord) -> CheckOutcome:
    """Check that the trace is of the model, heads and precision that the environment names.

    Commit and dirty flag are shown.
    """
    environment = record.environment
    wrong = []
    for backbone, trace in _traces(record).items():
        origin = environment if backbone == "original" else environment.tuned
        if origin is None:
            wrong.append(f"{backbone} backbone of the environment")
        elif trace is not None:
            traced = trace.provenance
            pairs = {
                "backbone": (traced.model_hash, origin.backbone_sha256),
                "heads": (traced.heads_hash, origin.heads_sha256),
                "dtype": (traced.dtype, environment.dtype),
            }
            mark = "" if backbone == "original" else f"{backbone} "
            wrong += [mark + name for name, (ours, theirs) in pairs.items() if ours != theirs]
    if environment.dtype != record.suite.model.dtype:
        wrong.append("dtype of the suite")
    roundings = [record.rounding_of(backbone) for backbone in record.suite.backbones]
    if any(rounding is not None and environment.dtype != rounding.dtype for rounding in roundings):
        wrong.append("dtype of the rounding")
    commit = f"commit {environment.commit[:8]}" if environment.commit is not None else "no git commit"
    state = {True: ", with uncommitted changes", False: ", clean", None: ""}[environment.dirty]
    found = commit + state + _first(", disagreeing", wrong)
    return _outcome(
        "provenance_agrees", not wrong, found=found, need="a trace of the same backbone, heads and dtype"
    )


def bandwidth_sane(record: RunRecord) -> CheckOutcome:
    """Check that vanilla does not read its weights faster than the device can."""
    if not record.reports_speed:
        return _skipped("bandwidth_sane", "the suite reports no speed")
    shares = {
        arm.name: bandwidth_share(record, arm.name) for arm in record.suite.arms if arm.method == "vanilla"
    }
    known = {arm: share for arm, share in shares.items() if share is not None}
    if not known:
        was_measured = record.device_limits is not None
        return _skipped("bandwidth_sane", "no quiet step" if was_measured else "no bandwidth was measured")
    found = ", ".join(f"{arm} reads at {share:.2f} of the measured bandwidth" for arm, share in known.items())
    return _outcome(
        "bandwidth_sane",
        max(known.values()) <= MAX_BANDWIDTH_SHARE,
        found=found,
        need=f"at most {MAX_BANDWIDTH_SHARE}",
    )


def within_limits(record: RunRecord) -> CheckOutcome:
    """Check that no step was faster than the device was measured to be, in reading or in products."""
    if not record.reports_speed:
        return _skipped("within_limits", "the suite reports no speed")
    limits = [record.device_limits] if record.device_limits is not None else []
    return limits_outcome("within_limits", limits, run_shares(record))


def steps_as_timed_apart(record: RunRecord) -> CheckOutcome:
    """Check that an arm's decoding steps last as long as its steps timed apart, in the same block."""
    if not record.reports_speed:
        return _skipped("steps_as_timed_apart", "the suite reports no speed")
    ratios = {arm.name: decoded_over_apart(record, arm.name) for arm in _on_our_engine(record)}
    known = {arm: ratio for arm, ratio in ratios.items() if ratio is not None}
    if not known:
        return _skipped("steps_as_timed_apart", "no arm has quiet steps, separate ones too, on four prompts")
    is_cpu = record.environment.device.kind == "cpu"
    shorter = MAX_APART if is_cpu else MAX_WAITS_APART
    wrong = []
    for arm, ratio in known.items():
        noise = NOISE_ERRORS * ratio.error
        low, high = (min(bound + noise, LARGEST_APART) for bound in (shorter, MAX_APART))
        if not -low <= ratio.median <= high:
            wrong.append(
                f"{arm}'s decoding step is {exp(ratio.median):.3f} of the separate one, "
                f"not {exp(-low):.2f} to {exp(high):.2f}"
            )
    shares = [exp(ratio.median) for ratio in known.values()]
    return _outcome(
        "steps_as_timed_apart",
        not wrong,
        found=f"{min(shares):.2f} to {max(shares):.2f} of the separate steps in {len(known)} arms"
        + _first(", wrong", wrong),
        need=f"{exp(-shorter):.2f} to {exp(MAX_APART):.2f}, give or take three standard errors",
    )


def steps_as_priced(record: RunRecord) -> CheckOutcome:
    """Check that an arm's decoding step lies near what a step of as many nodes cost before the trials."""
    if not record.reports_speed:
        return _skipped("steps_as_priced", "the suite reports no speed")
    longest = MAX_CONTEXT_OVER_PRICED * record.suite.probes.step_context_tokens
    shares = {}
    for arm in _on_our_engine(record):
        price = priced(record, num_nodes(record, arm.name), part="step")
        times = [
            time
            for one in timed_generations(record, arm.name)
            if one.prompt_tokens + one.num_tokens <= longest
            for time in one.step_times_s
        ]
        if price is not None and times:
            shares[arm.name] = median(times) / price
    if not shares:
        return _skipped("steps_as_priced", "no price of a step of an arm's size")
    low, high = PRICED_STEPS
    wrong = [f"{arm} at {share:.2f}" for arm, share in shares.items() if not low <= share <= high]
    return _outcome(
        "steps_as_priced",
        not wrong,
        found=f"{min(shares.values()):.2f} to {max(shares.values()):.2f} of the price in {len(shares)} arms"
        + _first(", wrong", wrong),
        need=f"{low} to {high} of the step that was timed before the trials",
    )


def heads_are_timed(record: RunRecord) -> CheckOutcome:
    """Check that a separate Medusa step takes besides its backbone what heads and own code cost elsewhere.

    That is the price of its size, and the profile of its arm.
    """
    if not record.reports_speed:
        return _skipped("heads_are_timed", "the suite reports no speed")
    profiled = {
        row.arm: (row.step_s - row.backbone_s) / row.num_steps
        for row in (record.profile.rows if record.profile is not None else ())
        if row.num_steps
    }
    shares, wrong = [], []
    for arm in _on_our_engine(record):
        own = own_part_s(record, arm.name) if arm.method == "medusa" else None
        if own is None:
            continue
        references = {
            "its price": priced(record, num_nodes(record, arm.name), part="own"),
            "its profile": profiled.get(arm.name),
        }
        for name, reference in references.items():
            if reference is not None and reference > 0:
                shares.append(own / reference)
                if shares[-1] < MIN_OWN_PART:
                    wrong.append(f"{arm.name} takes {shares[-1]:.2f} of {name}")
    if not shares:
        return _skipped("heads_are_timed", "no Medusa arm has separate steps and a price or a profile")
    return _outcome(
        "heads_are_timed",
        not wrong,
        found=f"steps take {min(shares):.2f} to {max(shares):.2f} of what heads and own code cost elsewhere"
        + _first(", wrong", wrong),
        need=f"at least {MIN_OWN_PART}",
    )


def profile_adds_up(record: RunRecord) -> CheckOutcome:
    """Check that the parts of a profiled step make up the step: none outside of its clock, little in none.

    A Medusa step has a part for its heads.
    """
    if not record.reports_speed:
        return _skipped("profile_adds_up", "the suite reports no speed")
    rows = [row for row in (record.profile.rows if record.profile is not None else ()) if row.step_s > 0]
    if not rows:
        return _skipped("profile_adds_up", "no arm was profiled")
    drafting = {arm.name for arm in _on_our_engine(record) if num_nodes(record, arm.name) > 1}
    unexplained, wrong = [], []
    for row in rows:
        parts = row.backbone_s + row.heads_s + row.candidates_s + row.acceptance_s + row.cache_s
        rest = row.step_s - parts
        unexplained.append(rest / row.step_s)
        allowed = max(MAX_UNEXPLAINED_SHARE * row.step_s, MAX_UNEXPLAINED_S * row.num_steps)
        if rest < -CLOCK_ROUNDING * row.step_s:
            wrong.append(f"the parts of {row.arm} are {parts / row.step_s:.3f} of its step")
        elif rest > allowed:
            wrong.append(f"{rest / row.step_s:.1%} of a step of {row.arm} is in no part")
        elif row.arm in drafting and row.heads_s == 0:
            wrong.append(f"the heads of {row.arm} take no time")
    return _outcome(
        "profile_adds_up",
        not wrong,
        found=f"{min(unexplained):.1%} to {max(unexplained):.1%} of a step in no part, {len(rows)} arms"
        + _first(", wrong", wrong),
        need=f"parts within the step, and at most {MAX_UNEXPLAINED_SHARE:.0%} or "
        f"{1000 * MAX_UNEXPLAINED_S} ms in none",
    )


def vanilla_is_least(record: RunRecord) -> CheckOutcome:
    """Check that no Medusa step is much shorter than vanilla's, which is a part of it."""
    if not record.reports_speed:
        return _skipped("vanilla_is_least", "the suite reports no speed")
    ratios = {
        arm.name: steps_over(record, arm.baseline, of=arm.name)
        for arm in record.suite.arms
        if arm.method == "medusa" and arm.baseline is not None
    }
    return _vanilla_over(
        "vanilla_is_least", ratios, bound=MAX_VANILLA_OVER_MEDUSA, other="a Medusa arm's, which does more"
    )


def vanilla_against_generate(record: RunRecord) -> CheckOutcome:
    """Check that vanilla's step is not longer than that of `generate` of transformers."""
    if not record.reports_speed:
        return _skipped("vanilla_against_generate", "the suite reports no speed")
    ratios = {
        arm.name: steps_over(record, arm.baseline, of=arm.name)
        for arm in record.suite.arms
        if arm.method == "hf_greedy" and arm.baseline is not None
    }
    return _vanilla_over(
        "vanilla_against_generate", ratios, bound=MAX_VANILLA_OVER_GENERATE, other="that of generate"
    )


def processor_busy(record: RunRecord) -> CheckOutcome:
    """Check that no arm waits: the thread that decodes has a processor, as much of its time as its baseline.

    A pause in one arm alone shows however short it is against the load of the machine.
    """
    if not record.reports_speed:
        return _skipped("processor_busy", "the suite reports no speed")
    if record.environment.device.kind != "cpu":
        return _skipped("processor_busy", "the host waits for another device")
    shares = {arm.name: processor_shares(record, arm.name) for arm in _on_our_engine(record)}
    means = {arm: median(own.values()) for arm, own in shares.items() if own}
    if not means:
        return _skipped("processor_busy", "no processor time was recorded")
    wrong = [f"{arm} at {share:.2f}" for arm, share in means.items() if share < MIN_PROCESSOR_SHARE]
    for arm in _on_our_engine(record):
        base, own = shares.get(arm.baseline or arm.name, {}), shares[arm.name]
        more = paired([base[key] - own[key] for key in own if key in base])
        if more is not None and more.median > MAX_MORE_WAITING + NOISE_ERRORS * more.error:
            wrong.append(f"{arm.name} waits for {more.median:.1%} of its time more than {arm.baseline}")
    return _outcome(
        "processor_busy",
        not wrong,
        found=f"a processor for {min(means.values()):.2f} to {max(means.values()):.2f} of the time"
        + _first(", wrong", wrong),
        need=f"at least {MIN_PROCESSOR_SHARE:.2f}, and at most {MAX_MORE_WAITING:.1%} less than the baseline",
    )


TEXT_CHECKS: tuple[Check, ...] = (
    trials_complete,
    no_failures,
    seal_intact,
    token_counts,
    stop_rule,
    vanilla_steps,
    equal_prompts,
    equal_budgets,
    greedy_parity,
    sampled_parity,
    replay_equals_decode,
    heads_beat_random,
    repeats_agree,
    seeds_matter,
    acceptance_within_tree,
    provenance_agrees,
)
SPEED_CHECKS: tuple[Check, ...] = (
    timings_valid,
    machine_quiet,
    arms_interleaved,
    bandwidth_sane,
    within_limits,
    steps_as_timed_apart,
    steps_as_priced,
    heads_are_timed,
    profile_adds_up,
    vanilla_is_least,
    vanilla_against_generate,
    processor_busy,
)


CHECKS = (*TEXT_CHECKS, *SPEED_CHECKS)


def run_checks(record: RunRecord) -> tuple[CheckOutcome, ...]:
    """Return the outcome of every check, in order; one that cannot read what it judges has failed."""
    of_speeds = (_run(check, record).model_copy(update={"of_times": True}) for check in SPEED_CHECKS)
    return (*(_run(check, record) for check in TEXT_CHECKS), *of_speeds)


def _run(check: Check, record: RunRecord) -> CheckOutcome:
    try:
        return check(record)
    except UserError as error:
        where = f" in {error.where}" if error.where is not None else ""
        return _outcome(
            getattr(check, "__name__", "check"), False, found=f"{error.found}{where}", need=error.need
        )


def _traces(record: RunRecord) -> dict[BackboneName, Trace | None]:
    return {backbone: record.trace_of(backbone) for backbone in record.suite.backbones}


def _outcome(name: str, passed: bool, *, found: str, need: str) -> CheckOutcome:
    return CheckOutcome(
        name=name, status=CheckStatus.PASSED if passed else CheckStatus.FAILED, found=found, need=need
    )


def _skipped(name: str, why: str) -> CheckOutcome:
    return CheckOutcome(name=name, status=CheckStatus.SKIPPED, found=why, need="nothing")


def _none_wrong(name: str, wrong: list[str], *, checked: str, need: str) -> CheckOutcome:
    return _outcome(name, not wrong, found=f"{checked}, {len(wrong)} wrong" + _first("", wrong), need=need)


def _first(label: str, names: Iterable[str]) -> str:
    """Return a label with the first name and how many more there are; nothing if there is none."""
    listed = list(names)
    more = f" and {len(listed) - 1} more" if len(listed) > 1 else ""
    return f"{label}: {listed[0]}{more}" if listed else ""


def _name(trial: TrialKey) -> str:
    seed = f" seed {trial.seed}" if trial.seed is not None else ""
    return f"{trial.arm} {trial.prompt_key} round {trial.round}{seed}"


def _generations(record: RunRecord, *, arm: str | None = None) -> list[Generation]:
    return [generation for generation in record.generations if arm in (None, generation.trial.arm)]


def _attempts(record: RunRecord) -> list[Generation]:
    """Return every generation on disk, those whose trial was repeated included."""
    return [outcome for outcome in record.outcomes if isinstance(outcome, Generation)]


def _of_arms(record: RunRecord, chosen: Callable[[ArmSpec], bool]) -> list[Generation]:
    arms = {arm.name for arm in record.suite.arms if chosen(arm)}
    return [generation for generation in record.generations if generation.trial.arm in arms]


def _on_our_engine(record: RunRecord) -> list[ArmSpec]:
    return [arm for arm in record.suite.arms if arm.method in ("vanilla", "medusa")]


def _vanilla_over(
    name: str, ratios: Mapping[str, Paired | None], *, bound: float, other: str
) -> CheckOutcome:
    """Return whether vanilla's step is at most `bound` of every other arm's; the ratios are logarithms."""
    known = {arm: exp(ratio.median) for arm, ratio in ratios.items() if ratio is not None}
    if not known:
        return _skipped(name, "no such arm has four prompts that vanilla decoded too")
    wrong = [f"{share:.2f} of {arm}'s" for arm, share in known.items() if share > bound]
    return _outcome(
        name,
        not wrong,
        found=f"vanilla's step is {min(known.values()):.2f} to {max(known.values()):.2f} of theirs"
        + _first(", wrong", wrong),
        need=f"at most {bound} of {other}",
    )


def _prompt(generation: Generation) -> tuple[str, int, str | None]:
    return generation.trial.prompt_key, generation.prompt_tokens, generation.category


def _seeds_differ(generations: list[Generation]) -> bool:
    texts: dict[str, set[tuple[int, ...]]] = defaultdict(set)
    for generation in generations:
        if generation.trial.round == 0:
            texts[generation.trial.prompt_key].add(generation.token_ids)
    return any(len(ids) > 1 for ids in texts.values())


def _times_positive(generation: Generation) -> bool:
    return all(isfinite(time) and time > 0 for time in (generation.prefill_s, *generation.step_times_s))
