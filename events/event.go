// Package events is what a run tells of itself: the events that its peers
// append to one file, a line of JSON each, and what follows from them.
//
// Open a Log to write and a Tail to read while others write. A View is what a
// reader knows after any number of events: give each to View.Add. It is what
// the live view, the dashboard, the bill and the pictures of a run show, and it
// takes a bounded amount of memory however long the run is.
//
// A line that was torn or is too long is left out; everything that is read is
// taken for what some process wrote, and may say anything.
package events

import (
	"time"

	"github.com/spirt-ml/spirt/bill"
)

// Event is one line of a run's events.jsonl. Which fields are set depends on
// Event, its kind; the README of the run folder, docs/run-folder.md, lists
// them. Accuracies are fractions from 0 to 1, Model is a model hash.
type Event struct {
	Time  time.Time `json:"time"`
	Event string    `json:"event"`

	// round: one peer has finished one round.
	Peer      int       `json:"peer,omitempty"` // 1 to the number of peers
	Slot      uint64    `json:"slot,omitempty"`
	Round     uint64    `json:"round,omitempty"`
	Loss      *float64  `json:"loss,omitempty"` // mean over the peer's minibatches; in validation, done and eval over the samples
	Model     string    `json:"model,omitempty"`
	Members   []int     `json:"members,omitempty"` // whose averages the round contains; of waiting: for whom
	Seconds   float64   `json:"seconds,omitempty"`
	How       string    `json:"how,omitempty"` // recomputed, fetched or reorganised
	Degraded  bool      `json:"degraded,omitempty"`
	Steps     []Step    `json:"steps,omitempty"`     // how the time was spent
	Traffic   []Traffic `json:"traffic,omitempty"`   // since the peer's round before
	Used      *Usage    `json:"usage,omitempty"`     // by the peer since it started
	Spent     *Spent    `json:"spent,omitempty"`     // since the peer's round before
	Instances int       `json:"instances,omitempty"` // function instances that are alive

	// validation, eval: Accuracy and Loss; eval also Samples.
	Accuracy *float64 `json:"accuracy,omitempty"`
	Samples  int      `json:"samples,omitempty"` // that were evaluated; in round, that the peer computed gradients of

	// peer: Peer is now in State; By saw it (0: the process that started it).
	State string `json:"state,omitempty"`
	PID   int    `json:"pid,omitempty"`
	By    int    `json:"by,omitempty"`

	// run: the process that starts peers does so, State is started or resumed.

	// invocation: an attempt of a function of Peer has ended.
	Invocation *Invocation `json:"invocation,omitempty"`

	// waiting: Peer has been at Step of Slot for Seconds, for Members.
	Step string `json:"step,omitempty"`

	// warning: Peer reports something refused, dropped or late. About is the
	// peer that it is about, Cause what kind of thing it is.
	Message string `json:"message,omitempty"`
	Cause   string `json:"cause,omitempty"`
	About   int    `json:"about,omitempty"`

	// done: the run is over. Usage is that of all peers; without a timeout
	// the same seed gives the same model.
	Rounds     uint64      `json:"rounds,omitempty"`
	Run        string      `json:"run,omitempty"`
	StopReason string      `json:"stop_reason,omitempty"`
	CostUSD    *bill.Money `json:"cost_usd,omitempty"`
	*Usage
	Peers []PeerDone `json:"peers,omitempty"`
}

// Causes of warnings.
const (
	CauseRefused  = "gradient-refused" // About's average is not one to train on
	CauseFunction = "function-failed"  // a function crashed, timed out or answered nonsense
	CauseMemory   = "out-of-memory"
	CauseDisk     = "disk-full"
	CauseClock    = "clock-jump"
	CauseNetwork  = "network-lost" // this peer has lost all others at once
	CauseProtocol = "protocol"     // a timeout, or a message that contradicts another
)

// Step is a part of a round at a peer.
type Step struct {
	Step string  `json:"step"` // see Steps
	At   float64 `json:"at"`   // milliseconds from the beginning of the round
	MS   float64 `json:"ms"`   // how long it took
}

// Steps are the steps of a round in their order: compute the minibatches'
// gradients; announce the average, and gather those of others; ballot on which
// are held; fetch what the record needs; apply it: aggregate and update; record
// the result and gather the others' records; pause between slots that failed;
// pursue the state of another head.
var Steps = []string{"compute", "gather", "ballot", "fetch", "apply", "record", "pause", "pursue"}

// Traffic is what a peer exchanged with another, in bytes.
type Traffic struct {
	Peer int   `json:"peer"`
	In   int64 `json:"in"`
	Out  int64 `json:"out"`
}

// Spent is what a round, or whatever else, cost.
type Spent struct {
	bill.Usage
	CostUSD bill.Money `json:"cost_usd"`
}

// Invocation is one attempt of a function.
type Invocation struct {
	Task      string  `json:"task"` // gradient or evaluate
	Round     uint64  `json:"round,omitempty"`
	Minibatch int     `json:"minibatch,omitempty"` // of the round, from 0
	Attempt   int     `json:"attempt"`             // from 1
	Instance  int     `json:"instance,omitempty"`  // process id
	Cold      bool    `json:"cold,omitempty"`      // an instance was started for it
	QueueMS   float64 `json:"queue_ms"`
	InitMS    float64 `json:"init_ms,omitempty"`
	MS        float64 `json:"ms"`        // from handing over the event to having the result
	BilledMS  int64   `json:"billed_ms"` // init and duration, rounded up
	MemoryMB  int     `json:"memory_mb"`
	PeakMB    int     `json:"peak_mb,omitempty"`
	Error     string  `json:"error,omitempty"` // type of the failure
}

// Usage is what is paid for it.
func (i *Invocation) Usage() bill.Usage {
	return bill.Usage{Invocations: 1, MBMillis: i.BilledMS * int64(i.MemoryMB)}
}

// Usage counts what one or all peers have used since they started.
type Usage struct {
	Invocations int     `json:"invocations"`
	GBSeconds   float64 `json:"gb_seconds"` // billed time x configured memory
	Bytes       int64   `json:"bytes"`      // sent to other peers
	Timeouts    int     `json:"timeouts"`   // protocol timeouts that fired
}

// PeerDone is how one peer ended.
type PeerDone struct {
	Peer  int    `json:"peer"`
	State string `json:"state"` // finished, or how it was lost
	Round uint64 `json:"round"`
	Model string `json:"model,omitempty"`
}
