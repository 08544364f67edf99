"""Named errors. Each message states the rule, the value received, where it came from and what to do."""


class VectormillError(Exception):
    """Base of every error that is the user's to mend: printed as one line, without a traceback.

    `exit_code` is what the command line returns (documented in the README).
    """

    exit_code = 1


class ConfigError(VectormillError):
    """A setting, an argument or a column name that cannot be used."""

    exit_code = 2


class SourceError(VectormillError):
    """The corpus cannot be read: nothing matches, a column is missing, an object is damaged, changed or gone."""

    exit_code = 3


class SourceChangedError(SourceError):
    """An object is not the one that was listed: another etag, or vanished."""


class RejectLimitError(VectormillError):
    """More rows were rejected than `read.max_reject_fraction` allows."""

    exit_code = 4


class IntegrityError(VectormillError):
    """An object is missing, truncated, damaged or foreign. The message names it."""

    exit_code = 5


class FingerprintError(VectormillError):
    """Work or an index made with another configuration, code or model than the one asked for."""

    exit_code = 6


class FencedError(VectormillError):
    """Another run took over the index root. The message names it."""

    exit_code = 7


class ResourceError(VectormillError):
    """The machine or the cluster cannot hold the demands of the job, or stopped making progress."""

    exit_code = 8


class IndexNotFoundError(VectormillError):
    """No published index at the root."""

    exit_code = 9


class QualityError(VectormillError):
    """The candidate's measured recall is under the bound. Nothing was published."""

    exit_code = 10
