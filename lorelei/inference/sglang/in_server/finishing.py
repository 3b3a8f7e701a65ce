"""When a completion is over: at the tokens and strings of its request, and at no other.

SGLang stops at the model's own end token too or, told to ignore it, at no token; and it looks
for stop strings in as many last tokens as the string has when it is encoded by itself.
"""

from __future__ import annotations

from typing import Any

from lorelei.inference.stops import StopStrings


def install() -> None:
    """Replace SGLang's checks of requests that ignore the end token, as all of ours do."""
    from sglang.srt.managers.schedule_batch import FINISH_MATCHED_STR, FINISH_MATCHED_TOKEN, Req

    by_token, by_string = Req._check_token_based_finish, Req._check_str_based_finish

    def asked_token(self: Any, new_accepted_tokens: list[int]) -> bool:
        params = self.sampling_params
        if not params.ignore_eos:
            return by_token(self, new_accepted_tokens)
        for number, token in enumerate(new_accepted_tokens):
            if token in (params.stop_token_ids or ()):
                self.finished_reason = FINISH_MATCHED_TOKEN(matched=token)
                self.finished_len = len(self.output_ids) - len(new_accepted_tokens) + number + 1
                return True
        return False

    def asked_string(self: Any, new_accepted_len: int = 1) -> bool:
        strings = self.sampling_params.stop_strs
        if not (self.sampling_params.ignore_eos and strings):
            return by_string(self, new_accepted_len)
        watch = vars(self).setdefault("lorelei_stops", StopStrings(self.tokenizer, strings))
        count = len(self.output_ids)
        for end in range(count - new_accepted_len, count):
            if watch.completes(self.output_ids[end]):
                self.finished_reason = FINISH_MATCHED_STR(matched=strings[0])
                self.finished_len = end + 1
                return True
        return False

    Req._check_token_based_finish = asked_token
    Req._check_str_based_finish = asked_string
