package tensordb

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/spirt-ml/spirt/resp"
)

// Command describes a command of the database. The table of all of them,
// Commands, is what the server obeys, what COMMAND DOCS answers, what the
// Redis module registers and what docs/commands.md is made of.
type Command struct {
	Name       string // upper case
	Args       string // how it is called, after the name
	Summary    string
	Reply      string
	Group      string // a heading of docs/commands.md
	Complexity string // n is the number of elements
	Min, Max   int    // arguments with the name; Max 0: no maximum
	Access     Access
	Payload    bool // the last argument is the bytes of a tensor
	// Arguments FirstKey to LastKey are keys, counted from the name, which is
	// 0; LastKey -1 is the last one, and FirstKey 0 means none. Of those, every
	// KeyStep-th is; 0 means each.
	FirstKey, LastKey, KeyStep int
	// Waits: it may wait for another command.
	Waits bool

	stranger  bool // allowed before AUTH
	likeRedis bool // a wrong number of arguments is told as Redis 6 does
	run       func(c *Call) error
	serve     func(c *conn, args [][]byte) error // in place of run: only this package's Server has it
}

// ServerOnly reports whether the command is one of this package's Server, such
// as AUTH, for which another host has its own.
func (cmd *Command) ServerOnly() bool { return cmd.run == nil }

// Usage returns the whole line that shows how to call it.
func (cmd *Command) Usage() string {
	if cmd.Args == "" {
		return cmd.Name
	}
	return cmd.Name + " " + cmd.Args
}

// CheckArgs reports a wrong number of arguments, the name included, which was
// sent as typed.
func (cmd *Command) CheckArgs(n int, typed []byte) error {
	wrong := n < cmd.Min || cmd.Max > 0 && n > cmd.Max
	if wrong && cmd.likeRedis {
		return refuse("ERR", "wrong number of arguments for '%s' command", typed)
	}
	if wrong {
		return refuse("ERR", "wrong number of arguments for %s: use %s", cmd.Name, cmd.Usage())
	}
	return nil
}

// Keys calls f for each argument that is a key. args is without the name, and
// may be without the payload.
func (cmd *Command) Keys(args [][]byte, f func(key []byte) error) error {
	if cmd.FirstKey == 0 {
		return nil
	}
	last := cmd.LastKey
	if last < 0 || last > len(args) {
		last = len(args)
	}
	for i := cmd.FirstKey; i <= last; i += max(cmd.KeyStep, 1) {
		if err := f(args[i-1]); err != nil {
			return err
		}
	}
	return nil
}

// Call is a command that is carried out.
type Call struct {
	DB      *DB
	Args    [][]byte // without the name and the payload; valid during the call
	Payload Payload  // of a command that has one
	Reply   Replier
	// MaxReply bounds the bytes of a tensor in a reply. Zero: 1 GiB.
	MaxReply int64
	// Done, if not nil, is closed when the caller is gone: nothing waits on.
	Done <-chan struct{}

	cmd *Command
}

// Payload is the bytes of a tensor that end a command.
type Payload interface {
	// Size returns how many there are.
	Size() (int, error)
	// Read fills dst, which has as many. check, if not nil, sees each part as
	// it comes, in whole floats.
	Read(dst []byte, check func(part []byte, offset int)) error
}

// Held is a Payload that lies in memory already.
type Held interface {
	Payload
	// Hold returns the bytes, which stay as they are until release is called.
	Hold() (data []byte, release func())
}

// Replier takes the reply of a command.
type Replier interface {
	Simple(s string)
	Int(n int64)
	Double(x float64)
	Float17(x float64) // with 17 digits, as RedisAI does
	Bulk(b []byte)     // copied
	Text(s string)
	Nil()
	Array(n int) // the n elements follow
	Map(n int)   // n pairs follow
	// Tensor answers with bytes that may be many and are not copied if that
	// can be. An error ends the connection.
	Tensor(data []byte) error
}

// Run carries the command out and replies. A *resp.Error is the reply instead
// of what was replied so far; another error means that the caller is gone.
func (cmd *Command) Run(c *Call) error {
	c.cmd = cmd
	if c.MaxReply <= 0 {
		c.MaxReply = 1 << 30
	}
	err := cmd.run(c)
	if code := errorCode(err); code != "" {
		return &resp.Error{Code: code, Message: err.Error()}
	}
	return err
}

func refuse(code, format string, args ...any) error {
	return &resp.Error{Code: code, Message: fmt.Sprintf(format, args...)}
}

// errorCode returns the code word for an error of the database, empty for
// another error.
func errorCode(err error) string {
	for _, e := range []struct {
		is   error
		code string
	}{
		{ErrNoKey, "NOKEY"}, {ErrNotFinite, "NOTFINITE"}, {ErrOutOfRange, "OUTOFRANGE"}, {ErrWrongType, "WRONGTYPE"},
		{ErrIncomplete, "INCOMPLETE"}, {ErrMemory, "OOM"}, {ErrClosed, "ERR"},
	} {
		if errors.Is(err, e.is) {
			return e.code
		}
	}
	return ""
}

// longestName bounds the copy that FindCommand makes.
const longestName = 32

// FindCommand returns the command of a name in any case, nil if there is none,
// and the name in upper case, cut off where it is longer than any.
func FindCommand(name []byte) (string, *Command) {
	if len(name) > longestName {
		return string(name[:longestName]), nil
	}
	upper := strings.ToUpper(string(name))
	commandTable()
	return upper, table.byName[upper]
}

// Commands returns all commands, by group and name.
func Commands() []*Command { return slices.Clone(commandTable()) }

// What the commands read from their arguments.

func (c *Call) arg(i int) string { return string(c.Args[i]) }

// strings returns the arguments from i on.
func (c *Call) strings(i int) []string {
	out := make([]string, 0, len(c.Args)-i)
	for _, a := range c.Args[i:] {
		out = append(out, string(a))
	}
	return out
}

func (c *Call) usage() error { return refuse("ERR", "use %s", c.cmd.Usage()) }

func (c *Call) ok() error {
	c.Reply.Simple("OK")
	return nil
}

// number reads a decimal argument.
func number(what string, arg []byte, lo, hi int) (int, error) {
	n, err := strconv.Atoi(string(arg))
	if err != nil {
		return 0, refuse("ERR", "%s %.32q is not a number", what, arg)
	}
	if n < lo || n > hi {
		return 0, refuse("OUTOFRANGE", "%s %d is not in [%d, %d]", what, n, lo, hi)
	}
	return n, nil
}

// unsigned reads a version or a step.
func unsigned(what string, arg []byte) (uint64, error) {
	n, err := strconv.ParseUint(string(arg), 10, 63)
	if err != nil {
		return 0, refuse("ERR", "%s %.32q is not a number", what, arg)
	}
	return n, nil
}

// float reads a finite decimal argument.
func float(what string, arg []byte) (float32, error) {
	x, err := strconv.ParseFloat(string(arg), 32)
	if err != nil || math.IsNaN(x) || math.IsInf(x, 0) {
		return 0, refuse("ERR", "%s %.32q is not a finite float32", what, arg)
	}
	return float32(x), nil
}

// shape reads dimensions.
func shape(args [][]byte) ([]int, error) {
	out := make([]int, len(args))
	for i, a := range args {
		var err error
		if out[i], err = number("dimension", a, 0, math.MaxInt); err != nil {
			return nil, err
		}
	}
	return out, nil
}
