"""One stage of training: its steps, its clock, its checkpoints, and evaluations that run beside it.

    stage = Stage("critics", "critics", args, runs, parts, generators, "critic_")
    for step, batch in stage.steps((replay, args.batch_size)):
        ...
        if step in stage.eval_steps:
            stage.save(rows)  # of metrics.csv, one per run
    stage.end()

Several runs at the same step are trained together, so all of this is for a list of runs. A stage that had begun goes on
from the runs' checkpoints. When a stop of the script is asked for, the steps end early. Then end() saves what the
resumed run needs, and leaves the script.
"""

import time
from concurrent.futures import Future, ThreadPoolExecutor

from environments import stops
from offline_data.replay import minibatches
from support.bars import Bar
from support.runs import LOOK, Run, check_parameters, eval_steps, loading, save_checkpoints
from support.seeds import load_seeds, name_seeds, seed_states


class Stage:
    """The steps of one stage, from where the runs are to args.steps.

    `name` is for error messages, `label` for the progress bar. `parts` are the stacked modules and their optimisers, by
    their names in a checkpoint; the first is the module that is trained. A checkpoint holds the step and the seconds of
    training under the names `prefix` + "step" and `prefix` + "seconds".
    """

    def __init__(self, name: str, label: str, args, runs: list[Run], parts: dict, generators: list, prefix: str = ""):
        self.name, self.args, self.runs, self.parts, self.generators = name, args, runs, parts, generators
        self.prefix, self.seeds, self.eval_steps = prefix, [run.seed for run in runs], eval_steps(args)
        self.start = self.step = runs[0].state[f"{prefix}step"]
        self.seconds, self.clock = runs[0].state[f"{prefix}seconds"], time.perf_counter()
        self.bar = Bar(f"{label} {name_seeds(self.seeds)}", args.steps, self.start, args.quiet)
        if self.start:
            with loading(runs):
                load_seeds(parts, generators, [run.state for run in runs])

    def steps(self, *sources):
        """Yields (step, a batch of each source), as minibatches does."""
        self.clock = time.perf_counter()
        for step, *batches in self.bar(minibatches(self.start, self.eval_steps, *sources)):
            self.step = step
            yield step, *batches
            if step in self.eval_steps:
                self.clock = time.perf_counter()  # saving does not count as training
            elif step % LOOK == 0:
                self.check()

    def check(self):
        """Raises Diverged for seeds with a parameter that is huge or not finite."""
        check_parameters(next(iter(self.parts.values())), self.seeds, f"step {self.step} of the {self.name}")

    def progress(self) -> list[dict]:
        """What each run's checkpoint needs from this stage. Raises Diverged as check does."""
        now = time.perf_counter()
        self.seconds, self.clock = self.seconds + now - self.clock, now
        self.check()
        reached = {f"{self.prefix}step": self.step, f"{self.prefix}seconds": self.seconds}
        return [state | reached for state in seed_states(self.parts, self.generators)]

    def save(self, rows: list[dict]):
        """Saves every run's checkpoint, and its row of metrics.csv."""
        self.bar.say(rows)
        save_checkpoints(self.runs, self.progress(), rows)

    def end(self):
        """After the last step: nothing. After a stop was asked for: saves and leaves."""
        if self.step < self.args.steps:
            self.stop([{} for _ in self.runs])

    def stop(self, more: list[dict]):
        """Saves the runs as they are, each with `more`, and leaves the script."""
        if self.step > self.start:
            states = [state | own for state, own in zip(self.progress(), more)]
            save_checkpoints(self.runs, states, [None for _ in self.runs])
        stops.leave()


def play_all(play, seeds: list[int], unplayed: list[dict]) -> list[dict]:
    # Not a method: the exception of a stop would keep the simulators alive, see environments.checks.run_script.
    return [play(seed, own["policy"], own["row"]) for seed, own in zip(seeds, unplayed)]


class Evaluations:
    """Evaluations of a stage's policies in a thread, beside the updates. Their results are saved in order.

    play(seed, parameters, row) plays a policy and returns its row of metrics.csv. An evaluation that a stop cuts short
    is kept in the checkpoint, under "unplayed": the policy, and the row that lacks its results. The resumed run plays
    it first.
    """

    def __init__(self, stage: Stage, play):
        self.stage, self.play = stage, play
        self.began = time.perf_counter() - stage.runs[0].state["wall"]
        self.waiting: list[tuple[list[dict], list[dict], Future]] = []  # states to save later, what is played, results
        self.thread = ThreadPoolExecutor(1)

    def __enter__(self):
        queues = [run.state.get("unplayed", []) for run in self.stage.runs]
        for i, unplayed in enumerate(zip(*queues)):
            self.submit([{"unplayed": queue[i + 1 :]} for queue in queues], list(unplayed))
        return self

    def __exit__(self, *error):
        self.thread.shutdown()

    def submit(self, states: list[dict], unplayed: list[dict]):
        """Plays every run's policy in the thread. Once that is done, `states` can be saved."""
        results = self.thread.submit(play_all, self.play, self.stage.seeds, unplayed)
        self.waiting.append((states, unplayed, results))

    def add(self, rows: list[dict]):
        """Evaluates the policies as they are now. `rows` of metrics.csv are what is known of them so far."""
        self.stage.bar.say(rows)
        states = [state | {"unplayed": []} for state in self.stage.progress()]
        self.submit(states, [{"policy": state["policy"], "row": row} for state, row in zip(states, rows)])
        self.save_finished(but=1)  # at most one evaluation runs beside the next updates

    def save_finished(self, but: int = 0):
        """Waits for all evaluations except the last `but`, and saves. Ends early if a stop cuts one short."""
        while len(self.waiting) > but:
            states, _, results = self.waiting[0]
            try:
                rows = results.result()
            except stops.Stopped:
                return
            self.stage.bar.say(rows)
            save_checkpoints(self.stage.runs, [state | {"wall": self.wall()} for state in states], rows)
            del self.waiting[0]

    def end(self):
        """After the last step: waits for the evaluations. After a stop was asked for: saves and leaves."""
        if self.stage.step == self.stage.args.steps:
            self.save_finished()
        if self.stage.step < self.stage.args.steps or self.waiting:
            queues = [[unplayed[i] for _, unplayed, _ in self.waiting] for i in range(len(self.stage.runs))]
            self.stage.stop([{"wall": self.wall(), "unplayed": queue} for queue in queues])

    def wall(self) -> float:
        """Seconds that the stage took so far, waiting for evaluations included, in all processes that trained it."""
        return time.perf_counter() - self.began
