"""Shows the progress of training: a bar in a terminal, a line every ten seconds elsewhere, nothing with --quiet."""

import sys
import time

from tqdm import tqdm

SECONDS = 10  # between two lines
# column of metrics.csv -> its name in the bar
SHOWN = {"nu_loss": "loss", "policy_loss": "loss", "mean_nu": "nu_tot", "ess": "ess"}
SHOWN |= {"return": "return", "winrate": "winrate"}


class Bar:
    """Used as `for step, *batch in bar(batches)`. Only bar.say(rows) gives it values, so it never waits for a GPU."""

    def __init__(self, label: str, total: int, start: int = 0, quiet: bool = False):
        self.label, self.total, self.start, self.quiet, self.values = label, total, start, quiet, {}
        self.terminal = sys.stderr.isatty()

    def __call__(self, steps):
        if self.quiet:
            yield from steps
            return
        begin = last = time.monotonic()
        # Without `disable` tqdm would draw into log files too.
        self.bar = tqdm(total=self.total, desc=self.label, initial=self.start, mininterval=1, disable=not self.terminal)
        with self.bar:
            for step, *batches in steps:
                yield step, *batches
                self.bar.update()
                if not self.terminal and time.monotonic() - last > SECONDS:
                    last = time.monotonic()
                    speed = (step - self.start) / (last - begin)
                    values = "".join(f", {name} {value}" for name, value in self.values.items())
                    line = f"{self.label}: step {step} of {self.total}, {speed:.0f} per second{values}"
                    print(line, file=sys.stderr, flush=True)

    def say(self, rows: list[dict]):
        """Shows the means over the seeds of these rows of metrics.csv from now on."""
        for key, name in SHOWN.items():
            values = [row[key] for row in rows if row.get(key) is not None]
            if values:
                self.values[name] = f"{sum(values) / len(values):.4g}"
        if not self.quiet and self.terminal:
            self.bar.set_postfix(self.values, refresh=False)
