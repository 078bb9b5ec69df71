package function

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
)

// Types of failures that the platform reports itself; the names are Lambda's.
const (
	TypeTimeout  = "Sandbox.Timedout"
	TypeExit     = "Runtime.ExitError"
	TypeMemory   = "Runtime.OutOfMemory"
	TypeInit     = "Runtime.InitError"
	TypeTooLarge = "Function.ResponseSizeTooLarge"
)

// permanentPrefix begins the type of each handler error that would come again at the next attempt.
const permanentPrefix = "Permanent"

// errThrottled says that every instance is taken; only the Invoke API, which does not wait, meets it.
var errThrottled = errors.New("all instances are taken")

// FunctionError is an error that a handler returned, or the end of the instance that ran it. Its JSON is Lambda's.
type FunctionError struct {
	Type       string          `json:"errorType"`
	Message    string          `json:"errorMessage"`
	StackTrace json.RawMessage `json:"stackTrace,omitempty"` // as the function's runtime reported it
	Output     string          `json:"-"`                    // last lines the instance printed, when it crashed
}

func (e *FunctionError) Error() string {
	s := e.Type + ": " + e.Message
	if e.Output != "" {
		s += fmt.Sprintf("; its last output: %q", e.Output)
	}
	return s
}

// Permanent reports whether another attempt could only end in the same way.
func (e *FunctionError) Permanent() bool {
	return strings.HasPrefix(e.Type, permanentPrefix) || e.Type == TypeTooLarge
}

// decodeFunctionError reads what a runtime posted as an error; header is the type in its header. Functions may post anything.
func decodeFunctionError(header string, body []byte) *FunctionError {
	e := &FunctionError{}
	if err := json.Unmarshal(body, e); err != nil {
		*e = FunctionError{Message: strings.ToValidUTF8(string(body), "\uFFFD")}
	}
	if e.Type == "" {
		e.Type = header
	}
	if e.Type == "" {
		e.Type = "Runtime.Unknown"
	}
	e.Type = cut(e.Type, 256)
	e.Message = cut(e.Message, 32<<10)
	return e
}

func cut(s string, n int) string {
	if len(s) <= n {
		return s
	}
	return strings.ToValidUTF8(s[:n], "") + "..."
}
