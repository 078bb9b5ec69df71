// Package round is one peer's part in agreeing, round by round and without a
// leader, which gradients go into the model: a pure state machine, in the way
// of etcd's raft. It has no goroutine, clock, disk, socket or randomness; the
// same events give the same actions.
//
// Call New with a Config, then Step with a Start event and with everything
// that happens afterwards, from one goroutine, and execute the returned
// actions in order before the next Step. Messages are signed and encoded by
// Sign and checked by Open; only what Open accepted may go into a Received
// event. docs/protocol.md holds the protocol, and what the host owes the
// machine for each action.
//
// Guarantees, however messages are lost, reordered or repeated: the machine
// never asks for two different messages of one type for one slot and parent,
// nor for one counter twice, nor for votes that contradict each other, also
// over restarts (the host must execute Persist before what follows it, and
// write what Checkpoint and PersistVote hold before it answers them); it signs
// a record only with the model that this host itself computed from the
// record's gradients; two final checkpoints never conflict while fewer than a
// third of the members lie; its memory is bounded by the rosters, and by how
// long nothing became final, whatever is received.
package round

import (
	"fmt"
	"slices"
	"time"
)

// MaxFaulty returns the largest number of Byzantine peers that a roster of n
// is laid out for: floor((n-1)/3).
func MaxFaulty(n int) int { return (n - 1) / 3 }

// Quorum returns how many of n members must vote for a checkpoint to justify
// it: floor(2n/3)+1.
func Quorum(n int) int { return 2*n/3 + 1 }

// Roster is what the machine needs to know of one. Who checked its signatures
// is the host.
type Roster struct {
	Hash     Hash
	Previous Hash // of the roster that it follows
	Members  []Peer
	F        int // at most this many of them are Byzantine; see MaxFaulty
	// Minibatches is how many the members deal among them in a round: what
	// Record.Position grows by.
	Minibatches uint64
	// Emergency says that it needs no quorum of the roster before.
	Emergency bool
}

func (r *Roster) has(p Peer) bool {
	_, ok := slices.BinarySearch(r.Members, p)
	return ok
}

// NewRoster returns a roster of the members 0 to n-1, for tests and
// simulations, that deals one minibatch to each.
func NewRoster(hash, previous Hash, n int) Roster {
	r := Roster{Hash: hash, Previous: previous, F: MaxFaulty(n), Minibatches: uint64(n)}
	for p := range Peer(n) {
		r.Members = append(r.Members, p)
	}
	return r
}

// Config describes one peer of one job.
type Config struct {
	Self Peer
	// Rosters are all that are known, among them that of Genesis and, if there
	// is one, of Head.
	Rosters []Roster

	Genesis Record // of height 0: see Genesis
	Rounds  uint64 // the run ends at this height; 0: only at the target
	// TargetAccuracy ends the run at the first record whose median validation
	// is at least so many ten thousandths right. 0: off.
	TargetAccuracy uint32
	// Patience ends the run at the first record after which so many validations
	// in a row brought no improvement. 0: off.
	Patience uint32
	// MinDelta is by how many millionths a validation's loss must be lower than
	// the best before it to count as an improvement. 0: by any.
	MinDelta int64
	// MaxGradientBytes refuses announcements of larger bodies. 0: the
	// package's MaxGradientBytes.
	MaxGradientBytes uint64

	// Head is the record whose state the host restored, and Links what
	// WriteCheckpoint said of it. Zero: Genesis.
	Head  Record
	Links []Checkpoint
	// Kept are the records of other checkpoints on disk, whose states the host
	// restored too.
	Kept []Record
	// OnDisk is the newest checkpoint on disk, where it is not Head: the host
	// has Head's state from elsewhere.
	OnDisk Hash
	// Watermark and Counter are those of the last Persist of this identity,
	// zero if there was none. Nothing at or below them is signed.
	Watermark, Counter uint64
	// CheckpointEvery is how many heights there are between two checkpoints; the
	// same for all peers of a job. 0: 64.
	CheckpointEvery uint64
	// Voted is the target of the last PersistVote of this identity. Zero: none.
	Voted Record
	// PauseAfter stops this peer from making records so many heights beyond
	// the last final checkpoint while less than a quorum is connected. 0: it
	// goes on.
	PauseAfter uint64
	// Reserve is how many slots and counters one Persist covers, so that not
	// every slot waits for a disk. 0: 16.
	Reserve uint64

	Timeouts Timeouts
}

// Timeouts bound every wait. They decide who gets into a record, never which
// model a record names. Zero values take the defaults given here.
type Timeouts struct {
	// Start is how long after Start a member is waited for that was not both
	// connected and heard of yet. 15 s.
	Start time.Duration
	// A slot waits for announcements and bodies for 1.5 times the 90th
	// percentile of recent arrivals, at least 3 times their median, within
	// these bounds; for GradientMax while there are few arrivals. 3 s, 30 s.
	GradientMin, GradientMax time.Duration
	// Ballots, and then records, are waited for 4 times the 99th percentile of
	// recent waits for them, within these bounds; for BallotMax while there
	// are few. 2 s, 10 s.
	BallotMin, BallotMax time.Duration
	// Fetch bounds the wait for a body that a record needs. 10 s.
	Fetch time.Duration
	// State bounds the wait for the state of another head. 30 s.
	State time.Duration
	// Retry is how long a head is passed over whose state could not be had,
	// unless somebody new signs on it. 5 s.
	Retry time.Duration
	// Orphan is how long a branch with no known link to this peer's must be
	// known before it can win a tie. 2 s.
	Orphan time.Duration
	// Linger is how long a peer that has finished waits for connected members
	// that have not, and for a quorum to be connected. 10 s.
	Linger time.Duration
	// Restart is Start for a peer that has a head already: those that are away
	// may be so for long. 3 s.
	Restart time.Duration
	// Pace is how long a slot takes at least while less than a quorum is
	// connected, where this peer has seen none with a quorum; else their
	// median, at most GradientMin. 100 ms.
	Pace time.Duration
}

// Event is what happened at or to this peer.
type Event interface{ event() }

// Events. A host that answers for something the machine no longer waits for
// does no harm.
type (
	// Start is the first event, given once.
	Start struct{}
	// Connected says that a member's authenticated connection is up.
	Connected struct{ Peer Peer }
	// Disconnected says that it is lost, or that its heartbeats stopped.
	Disconnected struct{ Peer Peer }
	// Received is a message that Open accepted, with the ID that Open gave; its
	// order does not matter, nor does repetition. RosterNotice, Contact and
	// Petition are the host's and ignored here.
	Received struct {
		Message Message
		ID      Hash
	}
	// RosterKnown tells of a roster that follows a known one.
	RosterKnown struct{ Roster Roster }
	// Evidence answers Accuse with what NewProof made of the two messages.
	Evidence struct{ Proof Proof }
	// Checkpointed answers WriteCheckpoint: the state is on disk, synced. A host
	// that could not write it, or left it out for a newer one, does not answer.
	Checkpointed struct{ Record Hash }
	// VotePersisted answers PersistVote: it is on disk, synced.
	VotePersisted struct{ Target Hash }
	// GradientReady answers Compute: the body is kept to be served and is held.
	GradientReady struct {
		Slot       uint64
		Parent     Hash
		Gradient   Hash
		Bytes      uint64
		Codec      uint8
		Validation Validation // for the announcement; Count 0: none
		Spent      uint64     // likewise
		Stop       Stop       // likewise
	}
	// GradientFailed answers Compute: there will be none for this slot.
	GradientFailed struct {
		Slot   uint64
		Parent Hash
	}
	// BodyReady answers Fetch: the body is held, hashed and checked.
	BodyReady struct {
		Peer     Peer
		Gradient Hash
	}
	// BodyRefused answers Fetch: the body is not one to train on (length,
	// not finite, norm), and never will be.
	BodyRefused struct {
		Peer     Peer
		Gradient Hash
		Reason   string
	}
	// BodyUnavailable answers Fetch: nobody gave it.
	BodyUnavailable struct {
		Peer     Peer
		Gradient Hash
	}
	// Applied answers Apply, with what follows from the set. The host holds
	// that state from now on.
	Applied struct {
		Slot         uint64
		Parent       Hash
		Set          []Entry
		Model, State Hash
	}
	// ApplyFailed answers Apply: it could not be done.
	ApplyFailed struct {
		Slot   uint64
		Parent Hash
		Reason string
	}
	// StateReady answers FetchState: the state is held, and its hashes are the
	// record's.
	StateReady struct{ Record Hash }
	// StateUnavailable answers FetchState: nobody gave it.
	StateUnavailable struct{ Record Hash }
	// Timer says that the time of the last SetTimer has come.
	Timer struct{}
)

func (Start) event()            {}
func (Connected) event()        {}
func (Disconnected) event()     {}
func (Received) event()         {}
func (RosterKnown) event()      {}
func (Evidence) event()         {}
func (Checkpointed) event()     {}
func (VotePersisted) event()    {}
func (GradientReady) event()    {}
func (GradientFailed) event()   {}
func (BodyReady) event()        {}
func (BodyRefused) event()      {}
func (BodyUnavailable) event()  {}
func (Applied) event()          {}
func (ApplyFailed) event()      {}
func (StateReady) event()       {}
func (StateUnavailable) event() {}
func (Timer) event()            {}

// Action is what the host has to do. String is one line for logs and traces.
type Action interface {
	action()
	fmt.Stringer
}

// How says where the state of a new head came from.
type How uint8

// The ways to a new head.
const (
	// Recomputed: the host computed it from the set.
	Recomputed How = iota
	// Fetched: the host has it from others, by its hash.
	Fetched
	// Kept: the host still had it (a step back, or sideways).
	Kept
)

func (h How) String() string { return [...]string{"recomputed", "fetched", "kept"}[h] }

// Reason says why a run ended.
type Reason uint8

// The reasons to end.
const (
	RoundsReached Reason = iota
	TargetReached
	// Converged: no improvement in Patience validations.
	Converged
	// OutOfTime and OutOfMoney: enough members wished it.
	OutOfTime
	OutOfMoney
	// Left: this peer is not on the roster any more.
	Left
	// Expelled: there is a proof against this peer's identity.
	Expelled
)

func (r Reason) String() string {
	return [...]string{"rounds", "target", "converged", "time", "money", "left", "expelled"}[r]
}

// Actions, to be executed in the order given.
type (
	// Persist writes the two numbers to disk, synced, before any later action
	// is executed.
	Persist struct{ Watermark, Counter uint64 }
	// Send signs the message and floods it to all members. The machine has
	// seen it already.
	Send struct{ Message Message }
	// Compute computes this peer's averaged gradient for round Height at the
	// state of the record Parent; Height, not Slot, decides the minibatches.
	// It replaces an earlier Compute that is not answered yet.
	Compute struct {
		Slot, Height uint64
		Parent       Hash
	}
	// Fetch gets and checks a body. Holders are connected members that should
	// have it, its announcer first; there is one at least.
	Fetch struct {
		Peer     Peer
		Gradient Hash
		Bytes    uint64
		Holders  []Peer
	}
	// Apply aggregates the set's gradients, in its order, and updates from
	// the state of the record Parent into a new one. Height is the step.
	Apply struct {
		Slot, Height uint64
		Parent       Hash
		Set          []Entry
		FUsed        uint16
	}
	// FetchState gets the state of a record by its two hashes and checks them.
	// Genesis has no holders: the host makes its state anew. It replaces an
	// earlier FetchState that is not answered yet.
	FetchState struct {
		Record  Record
		ID      Hash
		Holders []Peer
	}
	// Adopt makes a record, whose state the host holds, the head.
	Adopt struct {
		Record Record
		ID     Hash
		How    How
		// Reorganised says that the head before is not among its ancestors.
		Reorganised bool
	}
	// WriteCheckpoint writes the state of the record, which is held, to disk,
	// synced. The host answers Checkpointed when that is done, in its own time;
	// it keeps those on disk that Retain names.
	WriteCheckpoint struct {
		Record Record
		ID     Hash
		// Links are the checkpoints below it down to the last final one,
		// highest first: to be stored with it.
		Links []Checkpoint
	}
	// PersistVote writes the target to disk, synced, with the votes (messages
	// by their IDs) that justify its source, which the host gives to the
	// machine of the next start as Received, and answers VotePersisted.
	PersistVote struct {
		Target      Record
		Certificate []Hash
	}
	// Accuse says that the peer signed these two messages, of which an honest
	// peer signs only one. A host that still has both answers with Evidence.
	Accuse struct {
		Peer Peer
		A, B Hash
	}
	// Gate cuts a member off that is proven guilty.
	Gate struct {
		Peer Peer
		Text string
	}
	// Final says that a checkpoint is final, and all its ancestors with it.
	Final struct{ Checkpoint Checkpoint }
	// Retain is housekeeping at the start of a slot: the host keeps the states
	// of these records and the bodies of these gradients, and may drop all
	// others and stop fetching them, except what it has not yet given the
	// machine an event about; the network may forget messages of slots below
	// BelowSlot. A body or state that is being sent to somebody should be kept
	// until that is done. Of the checkpoints on disk it keeps those of the
	// records with the IDs in Checkpoints, and any that it has not yet answered
	// for.
	Retain struct {
		States      []Record
		Gradients   []Hash
		Checkpoints []Hash
		BelowSlot   uint64
	}
	// SetTimer asks for a Timer event at this time, on Step's clock. There is
	// one timer: this replaces the last. Zero: none.
	SetTimer struct{ At time.Duration }
	// Report is for people. Nothing depends on it.
	Report struct {
		Kind   ReportKind
		Peer   Peer // where the kind is about one
		Slot   uint64
		Height uint64
		Record Hash // where the kind is about one
		Text   string
		// Refused says of a BodyDropped that the body is not one to train on.
		Refused bool
	}
	// Finished ends the run: all connected members are at this record, or were
	// waited for. The machine does nothing more.
	Finished struct {
		Record Record
		ID     Hash
		Reason Reason
	}
)

func (Persist) action()         {}
func (Send) action()            {}
func (Compute) action()         {}
func (Fetch) action()           {}
func (Apply) action()           {}
func (FetchState) action()      {}
func (Adopt) action()           {}
func (WriteCheckpoint) action() {}
func (PersistVote) action()     {}
func (Accuse) action()          {}
func (Gate) action()            {}
func (Final) action()           {}
func (Retain) action()          {}
func (SetTimer) action()        {}
func (Report) action()          {}
func (Finished) action()        {}

// ReportKind tells reports apart.
type ReportKind uint8

// The kinds of reports.
const (
	PeerLost         ReportKind = iota // left the wait-set
	PeerReturned                       // is waited for again
	TimeoutGradient                    // fired, waiting for announcements or bodies
	TimeoutBallot                      // fired, waiting for ballots
	TimeoutRecord                      // fired, waiting for records
	TimeoutFetch                       // fired, waiting for a body that the record needs
	TimeoutState                       // fired, waiting for a state
	LateGradient                       // a gradient came too late and is dropped
	BodyDropped                        // a body was refused or could not be had
	GradientMissing                    // this peer has no gradient for the slot
	SlotFailed                         // the slot gave no new head
	DegradedRecord                     // the new head's set is smaller than 2f+1
	Reorganisation                     // the head moved to another branch
	Conflict                           // a second, different message: ignored
	InvalidMessage                     // a message that does not fit: ignored
	ModelDiffers                       // a record's model does not follow from its set here
	StateUnreachable                   // a head is passed over: nobody gave its state
	LingerExpired                      // finished, but not all connected members are
	PeerExpelled                       // there is a proof against a member
	RosterChanged                      // the head is under another roster than before
	FinalityBroken                     // two final checkpoints conflict: a third of the members or more lie
	Paused                             // nothing is final for long, and less than a quorum is connected
)

var reportNames = [...]string{
	"peer-lost", "peer-returned", "timeout-gradient", "timeout-ballot", "timeout-record",
	"timeout-fetch", "timeout-state", "late-gradient", "body-dropped", "gradient-missing",
	"slot-failed", "degraded-record", "reorganisation", "conflict", "invalid-message",
	"model-differs", "state-unreachable", "linger-expired",
	"peer-expelled", "roster-changed", "finality-broken", "paused",
}

func (k ReportKind) String() string { return reportNames[k] }

// Timeout reports whether the kind means that a timeout fired, so that another
// run with the same seed may differ from here on.
func (k ReportKind) Timeout() bool { return k >= TimeoutGradient && k <= TimeoutState }

func (a Persist) String() string {
	return fmt.Sprintf("persist watermark %d counter %d", a.Watermark, a.Counter)
}
func (a Send) String() string { return "send " + a.Message.String() }
func (a Compute) String() string {
	return fmt.Sprintf("compute slot %d height %d on %s", a.Slot, a.Height, a.Parent.Short())
}
func (a Fetch) String() string {
	return fmt.Sprintf("fetch %s of %d from %d", a.Gradient.Short(), a.Peer, a.Holders)
}
func (a Apply) String() string {
	return fmt.Sprintf("apply slot %d height %d on %s: %s", a.Slot, a.Height, a.Parent.Short(), describeSet(a.Set))
}
func (a FetchState) String() string {
	return fmt.Sprintf("fetch state of %s height %d from %d", a.ID.Short(), a.Record.Height, a.Holders)
}
func (a Adopt) String() string {
	s := fmt.Sprintf("adopt %s height %d slot %d set %s %s", a.ID.Short(), a.Record.Height, a.Record.Slot, describeSet(a.Record.Set), a.How)
	if a.Reorganised {
		s += " reorganised"
	}
	return s
}
func (a WriteCheckpoint) String() string {
	return fmt.Sprintf("checkpoint %s height %d", a.ID.Short(), a.Record.Height)
}
func (a PersistVote) String() string {
	return fmt.Sprintf("persist vote for height %d from height %d", a.Target.Height, a.Target.Justified.Height)
}
func (a Accuse) String() string { return fmt.Sprintf("accuse %d", a.Peer) }
func (a Gate) String() string   { return fmt.Sprintf("gate %d: %s", a.Peer, a.Text) }
func (a Final) String() string {
	return fmt.Sprintf("final %s height %d", a.Checkpoint.ID.Short(), a.Checkpoint.Height)
}
func (a Retain) String() string {
	return fmt.Sprintf("retain %d states %d gradients %d checkpoints slots from %d", len(a.States), len(a.Gradients), len(a.Checkpoints), a.BelowSlot)
}
func (a SetTimer) String() string {
	if a.At == 0 {
		return "timer off"
	}
	return "timer at " + a.At.String()
}
func (a Report) String() string { return "report " + a.Kind.String() + ": " + a.Text }
func (a Finished) String() string {
	return fmt.Sprintf("finished at %s height %d: %s", a.ID.Short(), a.Record.Height, a.Reason)
}
