"""Contract: every error has a stable code, and every code has a meaning and an exit status.

    LightshipError                    the root; carries .code, .remedy and .exit_status
      WireError        wire.*         bytes that are not the message they should be
      InvalidNameError name.*         an identifier outside the allowed alphabet
      SettingsError    settings.*     configuration that can't work
      DataError        data.*         a dataset that doesn't fit its schema
      TrainError       train.*        a run that failed
      GateError        gate.*         a version that may not go further
      ConvertError     convert.*      a model that can't become ONNX, or isn't the same there
      RegistryError    registry.*     unknown or ill-timed registry operations
      BundleError      bundle.*       a broken or incompatible bundle
      ReleaseError     release.*      signing and publishing
      TrustError       trust.*        signatures, versions and digests that don't verify
      EnrolError       enrol.*        identity: tokens, requests, certificates
      LinkError        link.*         network, broker
      UpdateError      update.*       trying and applying a bundle on a device
      ServingError     serving.*      a request that can't be answered
      FleetError       fleet.*        devices and rollouts
      StorageError     storage.*      disk and database
      AccessError      access.*       who may do what
      DriftError       drift.*        evidence that is not there
      AlertError       alert.*        what people are told of, and the channels on which
      DeviceError      device.*       the hardware at its limits: modes that are reported, and not raised
      MediaError       media.*        a file carried to a device without a network

Rules: a code, once released, keeps its meaning. Telemetry counts codes, exit statuses follow their family,
and `docs/reference/errors.md` is generated from `CODES`.
"""

from __future__ import annotations

from typing import ClassVar, Final

#: Process exit status per family. 0 is success, 1 an unexpected crash, 2 wrong usage of the command line.
EXIT_STATUS: Final[dict[str, int]] = {
    "wire": 10,
    "name": 11,
    "settings": 12,
    "data": 13,
    "train": 14,
    "gate": 15,
    "convert": 16,
    "registry": 17,
    "bundle": 18,
    "release": 19,
    "trust": 20,
    "enrol": 21,
    "link": 22,
    "update": 23,
    "serving": 24,
    "fleet": 25,
    "storage": 26,
    "access": 27,
    "drift": 28,
    "media": 29,
    "device": 30,
    "alert": 31,
}

CODES: Final[dict[str, str]] = {
    "wire.malformed": "The bytes are not a message of the expected type.",
    "wire.too-large": "The message is larger than its bound, before or after inflating.",
    "wire.tenant": "A report came under the topics of a tenant that the device does not belong to.",
    "wire.future": "A report is dated in the future; it is kept, at the time at which the server heard it.",
    "name.invalid": "An identifier holds characters outside its alphabet, or is too long.",
    "settings.invalid": "A setting has a value that can't be used.",
    "settings.missing": "A setting that has no default was not given.",
    "settings.exposed": "The address is reached from other machines, and lacks TLS, or tokens or client certificates.",
    "settings.port-taken": "The address is in use by another program.",
    "data.unreadable": "The file can't be read as CSV (or Parquet, where installed).",
    "data.empty": "The dataset has no rows, or no columns besides the target.",
    "data.column-missing": "A column that the schema or the command names is not in the file.",
    "data.column-unexpected": "The file has a column the schema does not know.",
    "data.type": "A value is not of the type its column has.",
    "data.missing-value": "A value is missing where the schema allows none.",
    "data.range": "A value is outside what its column can hold (not finite, or too large for float32).",
    "data.category": "A word is not among a feature's categories, or they are too many or malformed.",
    "data.unknown": "No dataset of that name or digest.",
    "data.stuck": "A feature had one and the same value in all rows of a window, and varied in training.",
    "data.unit": "Nearly all values of a feature are beyond what training saw, by another order of magnitude.",
    "data.swapped": "Two features have each other's values.",
    "data.gone": "A feature is missing far more often than in training.",
    "data.beyond": "A feature is beyond what training saw in many rows of a window.",
    "data.new-category": "A feature has unknown categories in many rows of a window.",
    "data.profile-mismatch": "Counts and profile do not have the same layout.",
    "train.unknown-estimator": "The recipe names an estimator that is not known, or not allowed.",
    "train.recipe": "The recipe is malformed, or its parameters do not fit the estimator.",
    "train.no-extra": "The recipe wants an explanation by a package that is not installed.",
    "train.failed": "Fitting raised; the run is recorded as failed with the estimator's own words.",
    "gate.metric": "A metric is below the minimum the gate sets.",
    "gate.champion": "The challenger is worse than the champion by more than the gate allows.",
    "gate.reason-required": "Forcing a version past a gate needs a reason, which is audited.",
    "convert.refused": "This kind of model is known to convert wrongly or not at all.",
    "convert.failed": "The converter raised.",
    "convert.timeout": "Conversion exceeded its time or memory and was stopped.",
    "convert.precision": "The model can't be had in that precision, or gains nothing by it.",
    "convert.parity": "The ONNX model does not agree with the original on the parity rows.",
    "convert.invalid-onnx": "The file is not a valid ONNX model, or needs what the device must not load.",
    "registry.unknown-model": "No registered model of that name.",
    "registry.unknown-version": "The registered model has no such version or alias.",
    "registry.state": "The version is not in a state that allows this.",
    "bundle.malformed": "The archive is not a flat, deterministic ustar of known members.",
    "bundle.digest": "The bytes do not have the digest they were promised to have.",
    "bundle.too-large": "The bundle, or one of its members, exceeds its bound.",
    "bundle.manifest": "The manifest is malformed or inconsistent with the members.",
    "bundle.graph": "The graph is malformed, or holds what no device loads (loops, foreign operators, other files).",
    "bundle.incompatible": "This device can't run the bundle (agent, runtime, opset, memory or device class).",
    "release.exists": "A release, repository or key of that name exists already, with other bytes.",
    "release.keys": "Signing keys are missing or unreadable.",
    "release.unknown": "No such release.",
    "release.expiry": "Something signed would end before the time that was asked for.",
    "release.not-begun": "The release repository has no signed root yet: its first ceremony is not finished.",
    "release.ceremony": "A ceremony file is malformed, asks for what can't work, or is not for this key.",
    "release.too-long": "The release list would be longer than devices read.",
    "release.expiring": "Signed metadata is near its end, or was not signed anew in time.",
    "release.threshold": "Not enough keys have signed yet.",
    "release.stale": "What is in force has changed since this was made, or it was made too long ago.",
    "trust.signature": "Signed metadata or an assignment does not verify with enough trusted keys.",
    "trust.expired": "Signed metadata or an assignment has expired: updates stop, serving goes on.",
    "trust.rollback": "Signed metadata or an assignment is older than one already accepted.",
    "trust.digest": "Downloaded bytes do not match the signed length or digest.",
    "trust.not-released": "The assignment names a bundle that is not in the signed release list.",
    "trust.foreign": "The assignment is meant for another device.",
    "trust.metadata": "Signed metadata is malformed or missing.",
    "enrol.token": "The join token is unknown, used up, expired or bound to another device.",
    "enrol.request": "The certificate request is not acceptable (name, key type or proof of possession).",
    "enrol.taken": "A device of that id is already enrolled.",
    "enrol.pin": "The server's certificate authority is not the one the token names.",
    "enrol.not-enrolled": "This device has no identity yet.",
    "enrol.revoked": "The device has been revoked.",
    "enrol.pending": "The device is enrolled and waits for the operator's approval.",
    "enrol.not-listed": "The join token is for listed devices, and this one is not on the list, or was used before.",
    "enrol.proof": "The proof of the registered key does not hold: signature, nonce or name.",
    "enrol.too-late": "The certificate ran out longer ago than a recovery is allowed: enrol anew.",
    "enrol.key": "The device's key can't be made, read or used where its URI says it is.",
    "enrol.certificate": "A client certificate is required, or the one shown is not acceptable.",
    "link.unreachable": "The server can't be reached.",
    "link.status": "The server answered with an unexpected status.",
    "link.slow": "The transfer was slower than its minimum rate or missed its deadline.",
    "link.taken-over": "Another program has taken this device's MQTT session: two go by one name.",
    "link.unacknowledged": "The broker takes reports, and the control plane acknowledges none: nobody hears them.",
    "link.expired-command": "A command came after its time, or would be valid for too long; it is dropped.",
    "link.replayed-command": "A command came a second time; it is dropped.",
    "link.unknown-command": "The device knows no such command.",
    "link.broker": "No MQTT broker can be started or reached.",
    "update.probe-failed": "The bundle failed in the probe process.",
    "update.probe-timeout": "The probe process exceeded its time, CPU or memory.",
    "update.golden": "The golden rows do not agree on this device's CPU.",
    "update.budget": "Latency or memory is above the manifest's budget on this device.",
    "update.swap": "The new model could not be made ready to serve.",
    "update.soak": "The new model failed while soaking.",
    "update.server-unreachable": "The control plane could not be reached after the swap.",
    "update.interrupted": "The update was cut short and was taken back at start.",
    "update.check-failed": "The process that checks assignments failed, or gave no answer.",
    "update.check-timeout": "The process that checks assignments exceeded its time or CPU.",
    "update.deferred": "Not now: a maintenance window, the network or somebody on site says so.",
    "update.superseded": "A newer assignment came while the bundle of this one was on its way.",
    "update.went-back": "Somebody at the device went back to the version before.",
    "update.no-way-back": "There is no version before this one to go back to.",
    "update.beside": "The bundle can't run beside the one that serves: other rows, other answers, an unknown mode.",
    "update.penalty": "The bundle failed too often here and waits in the penalty box.",
    "serving.malformed": "The request is not what the protocol says.",
    "serving.unknown-model": "No such model or version is being served here.",
    "serving.no-model": "This device has no model yet.",
    "serving.input": "Inputs do not fit the model: name, datatype, shape or content.",
    "serving.output": "A requested output does not exist.",
    "serving.too-large": "The request body or batch exceeds its bound.",
    "serving.overloaded": "The queue is full; try again after Retry-After seconds.",
    "serving.token": "A token of this agent is required, or the one shown is unknown.",
    "serving.origin": "The request names a host that is not this device, or comes from a page in a browser.",
    "serving.handshake": "A TLS handshake failed, or did not end in time.",
    "serving.deadline": "The request could not be answered in the time it was given.",
    "serving.slow": "The request did not arrive in time.",
    "serving.method": "The method is not supported on this path.",
    "serving.not-found": "No such path.",
    "serving.runtime": "The runtime raised while predicting.",
    "serving.memory": "The model has no room in memory beside what serves; what serves goes on.",
    "serving.in-use": "The model serves, or is needed beside what serves, and can't be unloaded.",
    "serving.not-allowed": "The agent's settings or the bundle's record on this device do not allow this.",
    "serving.no-background": "The bundle has no background rows, so its answers can't be explained.",
    "serving.metric-name": "A number of the application's has a name outside the alphabet, or too long.",
    "serving.metric-kind": "A number of the application's was told as another kind before, or with other edges.",
    "serving.metric-value": "A number of the application's is none, or not one its kind can take.",
    "serving.metric-full": "The application has told of more numbers than a device keeps.",
    "serving.unknown-prediction": "No recent prediction has that id.",
    "fleet.unknown-device": "No such device.",
    "fleet.unknown-ask": "The device was not asked that.",
    "fleet.unknown-letter": "No such dead letter.",
    "fleet.unassigned": "The device was never told what to run, or only what is no longer released.",
    "fleet.device-state": "The device is not in a state that allows this.",
    "fleet.preauthorisation": "An entry of the list of expected devices is malformed, known already or used up.",
    "fleet.unknown-rollout": "No such rollout.",
    "fleet.rollout-state": "The rollout is not in a state that allows this.",
    "fleet.rollout-spec": "The rollout's plan is malformed or selects no device.",
    "fleet.group-busy": "Another rollout of this model is already under way on some of these devices.",
    "fleet.unknown-experiment": "No such experiment.",
    "fleet.experiment-state": "The experiment is not in a state that allows this.",
    "fleet.experiment-spec": "The experiment can't be: its version, its share or its devices do not fit.",
    "storage.exists": "A file is there already, and is another one.",
    "storage.full": "No space is left; nothing was half-written.",
    "storage.quota": "The bundles that are needed take more room than this device grants them.",
    "storage.unwritable": "The directory can't be written.",
    "storage.unreadable": "The file can't be read.",
    "storage.busy": "Another program kept the database locked for too long.",
    "storage.schema": "The database is of another version; run `lightship db upgrade`.",
    "storage.not-initialised": "This is not a Lightship home; run `lightship init`.",
    "storage.corrupt": "A stored file or the audit chain is not what was written.",
    "access.token": "An API token is required, or the one shown is unknown, expired or revoked.",
    "access.role": "The token's role is too low for this act.",
    "access.environment": "The token is for another environment than this server's.",
    "access.exists": "An API token of that name exists, or existed.",
    "access.unknown": "No API token of that name.",
    "drift.unknown": "No drift evidence for that device or model.",
    "alert.unknown": "No such alert, mute or channel.",
    "alert.state": "The alert or the mute is over, or not open yet.",
    "alert.mute": "The mute is malformed, too long or has no reason.",
    "alert.secret": "A secret of an alert channel is missing, empty, malformed, or others may read its file.",
    "alert.unreachable": "The receiver of alerts can't be reached.",
    "alert.slow": "The receiver of alerts did not answer in time.",
    "alert.certificate": "The receiver of alerts shows a certificate that is not trusted for its name.",
    "alert.status": "The receiver of alerts answered with an unexpected status.",
    "alert.protocol": "The receiver of alerts does not speak what was expected: no STARTTLS, or another protocol.",
    "alert.login": "The mail server refused the user or the password.",
    "alert.refused": "The mail server refused the sender, a recipient or the message.",
    "alert.given-up": "A message was not taken for three days and is tried no more.",
    "device.throttled": "The processor is held back by heat or power.",
    "device.memory": "Little memory is left on the device, or programs stand still for want of it.",
    "device.clock": "The system's clock is behind what was authenticated, and is not believed.",
    "media.malformed": "The file is not a Lightship media file, or was altered.",
    "media.unreadable": "The media file can't be opened or read.",
    "media.truncated": "The media file ends too early: it was not copied whole.",
    "media.too-large": "The media file, or something in it, exceeds its bound.",
    "media.format": "The media file is of a format that this version does not read.",
    "media.foreign": "The media file holds nothing for this device.",
    "media.incomplete": "The media file lacks something that this device needs of it.",
    "media.waiting": "The agent has not settled the imported file in time.",
}


class LightshipError(Exception):
    """The root of every error Lightship raises on purpose.

    Args:
        code: a key of `CODES`, within the class's family.
        message: what was expected and what was found.
        remedy: what to do next; may be empty where the message already says it.
    """

    family: ClassVar[str] = ""

    def __init__(self, code: str, message: str, *, remedy: str = "") -> None:
        if code not in CODES or not code.startswith(self.family):
            bug = f"{code!r} is not a code of family {self.family!r}"
            raise AssertionError(bug)
        super().__init__(message)
        self.code = code
        self.message = message
        self.remedy = remedy

    @property
    def exit_status(self) -> int:
        """The process exit status of this error's family."""
        return EXIT_STATUS[self.code.partition(".")[0]]

    def __str__(self) -> str:
        return f"{self.message} {self.remedy}".rstrip()


class WireError(LightshipError):
    """Bytes that are not the message they should be."""

    family = "wire."


class InvalidNameError(LightshipError):
    """An identifier outside its alphabet."""

    family = "name."


class SettingsError(LightshipError):
    """Configuration that can't work."""

    family = "settings."


class DataError(LightshipError):
    """A dataset that does not fit its schema."""

    family = "data."


class TrainError(LightshipError):
    """A run that failed."""

    family = "train."


class GateError(LightshipError):
    """A version that may not go further."""

    family = "gate."


class ConvertError(LightshipError):
    """A model that can't become ONNX, or is not the same there."""

    family = "convert."


class RegistryError(LightshipError):
    """Unknown or ill-timed registry operations."""

    family = "registry."


class BundleError(LightshipError):
    """A broken or incompatible bundle."""

    family = "bundle."


class ReleaseError(LightshipError):
    """Signing and publishing went wrong."""

    family = "release."


class TrustError(LightshipError):
    """Signatures, versions or digests that do not verify."""

    family = "trust."


class EnrolError(LightshipError):
    """Identity: tokens, certificate requests, certificates."""

    family = "enrol."


class LinkError(LightshipError):
    """Network and broker."""

    family = "link."


class UpdateError(LightshipError):
    """Trying and applying a bundle on a device."""

    family = "update."


class ServingError(LightshipError):
    """A request that can't be answered."""

    family = "serving."


class FleetError(LightshipError):
    """Devices and rollouts."""

    family = "fleet."


class StorageError(LightshipError):
    """Disk and database."""

    family = "storage."


class AccessError(LightshipError):
    """Who may do what."""

    family = "access."


class DriftError(LightshipError):
    """Drift evidence that is not there."""

    family = "drift."


class DeviceError(LightshipError):
    """The device itself is at its limits; a mode it is in, and nothing that is raised."""

    family = "device."


class AlertError(LightshipError):
    """Alerts and the channels that carry them."""

    family = "alert."


class MediaError(LightshipError):
    """A file carried to a device without a network is broken, or not for it."""

    family = "media."


def error_of(code: str, message: str, *, remedy: str = "") -> LightshipError:
    """The error of that code, as the class of its family."""
    kind = next(k for k in LightshipError.__subclasses__() if code.startswith(k.family))
    return kind(code, message, remedy=remedy)
