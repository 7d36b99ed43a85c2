"""The forms of large convolutions that a command can be asked for."""

from typing import Literal, get_args

Form = Literal["auto", "none", "grouped", "dense", "strip"]
AUTO: Form = "auto"  # decides for backend and batch
FORMS: tuple[Form, ...] = get_args(Form)
LOWERED = "lowered"  # label of rows in the form that AUTO decided, beside those of the same network as it is
