package gradient

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"strings"

	"github.com/spirt-ml/spirt/nn"
)

// Tasks.
const (
	TaskGradient = "gradient" // the mean gradient of one minibatch, summed up in the database
	TaskEvaluate = "evaluate" // loss and correct answers; nothing is written
)

// Bounds of an Event.
const (
	MaxRows       = 4096    // of a minibatch
	MaxEvaluation = 500_000 // rows of an evaluation
	MaxMinibatch  = 1 << 30
	MaxRow        = 1 << 30
	maxToken      = 4096 // bytes
	maxKey        = 512  // bytes of a key or address
)

// Event says what to compute. Only keys travel in it, never tensors.
type Event struct {
	Task       string     `json:"task"`
	Database   Database   `json:"database"`
	Model      nn.Spec    `json:"model"`
	Parameters Parameters `json:"parameters"`
	Images     string     `json:"images"` // key of uint8 images, one a row
	Labels     string     `json:"labels"` // key of uint8 labels, one a row
	Rows       []int      `json:"rows"`   // which of them
	Scale      float32    `json:"scale"`  // a pixel is byte*Scale + Offset
	Offset     float32    `json:"offset"`
	Minibatch  int        `json:"minibatch,omitempty"`  // gradient: the place of this gradient in the sum
	Accumulate string     `json:"accumulate,omitempty"` // gradient: key of the sum
}

// Database is where the peer's tensors are.
type Database struct {
	Network string `json:"network"` // "unix", "tcp" or "tls"
	Address string `json:"address"`
	User    string `json:"user,omitempty"`   // for AUTH, before the token; empty: none
	Token   string `json:"token,omitempty"`  // for AUTH; empty: the instance's own
	Index   int    `json:"index,omitempty"`  // for SELECT; 0: none
	Stored  bool   `json:"stored,omitempty"` // it is a Redis server without tensor commands: see StoredKey
}

// Parameters names one version of the parameters. Version 0 is whichever the key holds.
type Parameters struct {
	Key     string `json:"key"`
	Version uint64 `json:"version"`
}

// Result is what an invocation returns.
type Result struct {
	Loss    float64 `json:"loss"` // mean over the samples
	Correct int     `json:"correct"`
	Samples int     `json:"samples"`
	Status  string  `json:"status,omitempty"` // gradient: "counted", "buffered" or "duplicate"
	Seconds Seconds `json:"seconds"`
}

// Seconds says where the time went.
type Seconds struct {
	Read    float64 `json:"read"`    // parameters and samples, from the database
	Compute float64 `json:"compute"` // normalising and the network
	Write   float64 `json:"write"`   // the gradient, into the database
}

// decodeEvent reads an event and checks all that can be checked without the database.
func decodeEvent(payload []byte) (Event, error) {
	var e Event
	decoder := json.NewDecoder(bytes.NewReader(payload))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&e); err != nil {
		return e, bad("the event is not what this function takes: %v", err)
	}
	if _, err := decoder.Token(); err != io.EOF {
		return e, bad("the event has text after its end")
	}
	return e, e.validate()
}

func (e Event) validate() error {
	limit := MaxRows
	switch e.Task {
	case TaskGradient:
		if err := checkKey("accumulate", e.Accumulate); err != nil {
			return err
		}
		if e.Minibatch < 0 || e.Minibatch > MaxMinibatch {
			return bad("minibatch is %d, want 0 to %d", e.Minibatch, MaxMinibatch)
		}
	case TaskEvaluate:
		limit = MaxEvaluation
		if e.Accumulate != "" || e.Minibatch != 0 {
			return bad("task %q writes nothing: leave out minibatch and accumulate", e.Task)
		}
	default:
		return bad("task %.40q is not %q or %q", e.Task, TaskGradient, TaskEvaluate)
	}
	if n := e.Database.Network; n != "unix" && n != "tcp" && n != "tls" {
		return bad("database network %.40q is not unix, tcp or tls", n)
	}
	if e.Database.Index < 0 || e.Database.Index > 1<<16 || len(e.Database.User) > maxKey {
		return bad("database index %d or its user is out of range", e.Database.Index)
	}
	if len(e.Database.Token) > maxToken || strings.ContainsRune(e.Database.Token, 0) {
		return bad("database token has %d bytes, want up to %d, none of them zero", len(e.Database.Token), maxToken)
	}
	for _, k := range []struct{ name, value string }{
		{"database address", e.Database.Address}, {"parameters key", e.Parameters.Key}, {"images", e.Images}, {"labels", e.Labels},
	} {
		if err := checkKey(k.name, k.value); err != nil {
			return err
		}
	}
	if len(e.Rows) < 1 || len(e.Rows) > limit {
		return bad("%d rows, want 1 to %d", len(e.Rows), limit)
	}
	for i, row := range e.Rows {
		if row < 0 || row > MaxRow {
			return bad("row %d is %d, want 0 to %d", i, row, MaxRow)
		}
	}
	if scale, offset := float64(e.Scale), float64(e.Offset); scale == 0 || math.IsInf(scale, 0) || math.IsNaN(scale) || math.IsInf(offset, 0) || math.IsNaN(offset) {
		return bad("scale %g and offset %g: want numbers, scale not 0", scale, offset)
	}
	if err := e.Model.Validate(); err != nil {
		return bad("%v", err)
	}
	return nil
}

func checkKey(name, key string) error {
	if key == "" || len(key) > maxKey || strings.ContainsRune(key, 0) {
		return bad("%s has %d bytes, want 1 to %d, none of them zero", name, len(key), maxKey)
	}
	return nil
}

// Types of errors. Those that begin with Permanent would come again, so the platform does not retry them.
const (
	BadEvent            = "PermanentBadEvent"   // the event cannot be right
	NotFinite           = "PermanentNotFinite"  // the gradient or the loss has a NaN or an infinity
	Stale               = "PermanentStale"      // the database has another version of the parameters
	Refused             = "PermanentRefused"    // the database refuses the token, a key or a value
	DatabaseUnavailable = "DatabaseUnavailable" // no connection, or it broke twice
	DatabaseFailed      = "DatabaseFailed"      // the database met an error of its own
)

// Error is an error with the type that the platform is told.
type Error struct {
	Type    string
	Message string
}

func (e *Error) Error() string { return e.Type + ": " + e.Message }

func bad(format string, args ...any) error { return fail(BadEvent, format, args...) }

func fail(kind, format string, args ...any) error {
	return &Error{Type: kind, Message: fmt.Sprintf(format, args...)}
}
