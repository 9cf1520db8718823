"""What an engine is given to do: to prefill, to decode, or both."""

import enum

from pdjax.core.messages import shown


class Role(enum.Enum):
    """The new work that an engine is given. Which steps an engine accepts bounds its role; what it
    has begun it also ends in another role.

    Attributes:
      prefills: whether it is given prompts.
      decodes: whether it is given sequences to decode.
    """

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"

    @property
    def prefills(self) -> bool:
        return self is not Role.DECODE

    @property
    def decodes(self) -> bool:
        return self is not Role.PREFILL

    def includes(self, other: "Role") -> bool:
        """Whether an engine of this role is given all that one of the other role is."""
        return self is other or self is Role.MIXED

    def common(self, other: "Role | None") -> "Role | None":
        """The role that is given what engines of both are; None where that is nothing."""
        if other is None:
            return None
        if self.includes(other):
            return other
        return self if other.includes(self) else None

    @classmethod
    def named(cls, role: "Role | str | None") -> "Role | None":
        """A role by its name; None, for an engine out of service, stays None.

        Raises:
          ValueError: there is no such role.
        """
        if role is None or isinstance(role, cls):
            return role
        for each in cls:
            if each.value == role:
                return each
        names = ", ".join(each.value for each in cls)
        raise ValueError(f"role={shown(role)}: must be {names} or None")

    @classmethod
    def of(cls, *, prefills: bool, decodes: bool) -> "Role":
        """The role that is given just that.

        Raises:
          ValueError: neither.
        """
        if prefills and decodes:
            return cls.MIXED
        if not (prefills or decodes):
            raise ValueError("a role prefills, decodes, or does both")
        return cls.PREFILL if prefills else cls.DECODE
