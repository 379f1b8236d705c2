"""The progress bar of sampling."""

from tqdm import tqdm


class RolloutBar(tqdm):
    """Rollouts so far, the time left, and tokens per second.

    Args:
        total: rollouts in the end.
        written: rollouts of an earlier run, which count as done but not for the speed.
    """

    def __init__(self, total: int, written: int):
        super().__init__(total=total, initial=written, unit="rollout", desc="rollouts")
        self._most, self._before_batch, self._tokens = total, written, 0

    def sampled(self, tokens: int) -> None:
        """So many tokens more were sampled."""
        self._tokens += tokens
        self.set_postfix_str(f"{self._tokens / max(self.format_dict['elapsed'], 1e-3):,.0f} tokens/s", refresh=False)

    def begin_batch(self, rollouts: int) -> None:
        """There are `rollouts` now, and a batch is begun."""
        self._before_batch = rollouts

    def show_batch(self, rollouts: float, tokens: int) -> None:
        """The batch has `rollouts` by now, half a one counting half, and so many tokens more were sampled."""
        self.sampled(tokens)
        self.update(min(self._most, int(self._before_batch + rollouts)) - self.n)
