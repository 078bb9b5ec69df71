package resp

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"strconv"
	"time"
)

// Kind tells what a Reply is.
type Kind uint8

// The kinds of replies.
const (
	Nil Kind = iota
	Simple
	Int
	Bulk
	Array
)

// Reply is one reply. Bytes, and the Bytes of Elems, are valid until the next
// call on the Conn; those of a Bulk start at a multiple of 8 bytes.
type Reply struct {
	Kind  Kind
	Int   int64
	Bytes []byte // of Simple and Bulk
	Elems []Reply
}

// DialOptions say how to connect.
type DialOptions struct {
	// Token is sent with AUTH, after User if there is one. Empty: no AUTH.
	User, Token string
	// TLS is for network "tls". Nil: as the system trusts.
	TLS *tls.Config
	// Timeout bounds dialling with AUTH, and each Do whose context has no
	// deadline. Zero: 30 seconds.
	Timeout time.Duration
	// Limits bound the replies.
	Limits Limits
}

// Conn is a connection to a RESP server. It is not safe for concurrent use.
// After any error that is not an *Error the connection is closed and every
// later call fails: dial again.
type Conn struct {
	nc      net.Conn
	r       *Reader
	timeout time.Duration
	broken  error
	header  []byte // headers and short arguments of a command
	arena   []byte // memory of bulk strings, reused by the next call
	used    int    // bytes of arena in use
	replies []Reply
}

// Dial connects to a server, such as network "unix" and the path of a socket,
// "tcp" or "tls" and host:port, and authenticates.
func Dial(ctx context.Context, network, address string, opts DialOptions) (*Conn, error) {
	if opts.Timeout == 0 {
		opts.Timeout = 30 * time.Second
	}
	dialer := &net.Dialer{Timeout: opts.Timeout}
	var nc net.Conn
	var err error
	if network == "tls" {
		nc, err = (&tls.Dialer{NetDialer: dialer, Config: opts.TLS}).DialContext(ctx, "tcp", address)
	} else {
		nc, err = dialer.DialContext(ctx, network, address)
	}
	if err != nil {
		return nil, fmt.Errorf("connecting to the database: %w", err)
	}
	c := &Conn{nc: nc, r: NewReader(nc, opts.Limits), timeout: opts.Timeout}
	if opts.Token != "" {
		args := []any{"AUTH", opts.User, opts.Token}
		if opts.User == "" {
			args = []any{"AUTH", opts.Token}
		}
		if _, err := c.Do(ctx, args...); err != nil {
			nc.Close()
			return nil, fmt.Errorf("authenticating to the database at %s: %w", address, err)
		}
	}
	return c, nil
}

// Close closes the connection.
func (c *Conn) Close() error {
	if c.broken == nil {
		c.broken = net.ErrClosed
	}
	return c.nc.Close()
}

// Do sends a command and waits for its reply. Arguments are string, []byte,
// int, int64, uint64, float32 or float64. An error reply is an *Error; one
// inside an array fails the call in the same way.
func (c *Conn) Do(ctx context.Context, args ...any) (Reply, error) {
	return c.DoInto(ctx, nil, args...)
}

// DoInto is Do with memory for the answer: a bulk string of exactly len(dst)
// bytes, the last if there are several, is read straight into dst, and the
// Reply aliases it. Of other lengths they go to memory of the Conn, as in Do.
func (c *Conn) DoInto(ctx context.Context, dst []byte, args ...any) (Reply, error) {
	replies, err := c.DoAll(ctx, Command{Args: args, Dst: dst})
	if err != nil {
		return Reply{}, err
	}
	return replies[0], nil
}

// Command is one of several commands that are sent at once.
type Command struct {
	Args []any
	Dst  []byte // memory for the answer, as in DoInto; nil for none
}

// DoAll sends commands in one piece and waits for all replies, which it
// returns in order: where each answer would have been waited for, that is one
// wait instead of many. All commands are run; if some are refused, the first
// *Error is returned and no reply. The replies are valid until the next call.
// A large argument belongs in the last command: before it is sent, a server
// may wait for somebody to read its answer.
func (c *Conn) DoAll(ctx context.Context, commands ...Command) ([]Reply, error) {
	if c.broken != nil {
		return nil, fmt.Errorf("the connection to the database was closed: %w", c.broken)
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	buffers, err := c.encode(commands)
	if err != nil {
		return nil, err
	}
	deadline, ok := ctx.Deadline()
	if !ok {
		deadline = time.Now().Add(c.timeout)
	}
	if err := c.nc.SetDeadline(deadline); err != nil {
		return nil, c.fail(ctx, err)
	}
	// A cancelled context wakes whatever read or write is going on. If the
	// wake-up has started when the reply is in, it is waited for, so that it
	// cannot strike the next call.
	woken := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		c.nc.SetDeadline(time.Unix(1, 0)) // an error here shows in the read
		close(woken)
	})
	replies, err := c.exchange(buffers, commands)
	if !stop() {
		<-woken
	}
	var refused *Error
	if err != nil && !errors.As(err, &refused) {
		return nil, c.fail(ctx, err)
	}
	return replies, err
}

// fail closes the connection: where in the stream it stands is not known.
func (c *Conn) fail(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	c.broken = err
	c.nc.Close()
	return fmt.Errorf("talking to the database: %w", err)
}

func (c *Conn) exchange(buffers net.Buffers, commands []Command) ([]Reply, error) {
	if _, err := buffers.WriteTo(c.nc); err != nil {
		// A server that refuses a command may answer and close before it has
		// read all of it: its reason says more than the broken pipe.
		c.nc.SetReadDeadline(time.Now().Add(time.Second))
		var refused *Error
		if _, replyErr := c.read(nil, 0); errors.As(replyErr, &refused) {
			c.broken = refused
			c.nc.Close()
			return nil, refused
		}
		return nil, err
	}
	c.used = 0
	c.replies = c.replies[:0]
	var first *Error
	for _, command := range commands {
		reply, err := c.read(command.Dst, 0)
		var refused *Error
		if errors.As(err, &refused) {
			if first == nil {
				first = refused
			}
		} else if err != nil {
			return nil, err
		}
		c.replies = append(c.replies, reply)
	}
	if first != nil {
		return nil, first
	}
	return c.replies, nil
}

// large arguments are written from where they lie.
const large = 4 << 10

// encode builds the commands. The buffers alias c.header and the large
// arguments.
func (c *Conn) encode(commands []Command) (net.Buffers, error) {
	type cut struct {
		at   int
		data []byte
	}
	var cuts [4]cut
	pending := cuts[:0]
	b := c.header[:0]
	for _, command := range commands {
		b = AppendArray(b, len(command.Args))
		for i, arg := range command.Args {
			switch v := arg.(type) {
			case string:
				b = AppendBulkString(b, v)
			case []byte:
				if len(v) < large {
					b = AppendBulk(b, v)
					break
				}
				b = AppendBulkHeader(b, len(v))
				pending = append(pending, cut{len(b), v})
				b = append(b, "\r\n"...)
			default:
				var number [32]byte
				text, err := appendNumber(number[:0], arg)
				if err != nil {
					return nil, fmt.Errorf("argument %d: %w", i, err)
				}
				b = AppendBulk(b, text)
			}
		}
	}
	c.header = b
	buffers := make(net.Buffers, 0, 2*len(pending)+1)
	at := 0
	for _, p := range pending {
		buffers = append(buffers, b[at:p.at], p.data)
		at = p.at
	}
	return append(buffers, b[at:]), nil
}

func appendNumber(b []byte, arg any) ([]byte, error) {
	switch v := arg.(type) {
	case int:
		return strconv.AppendInt(b, int64(v), 10), nil
	case int64:
		return strconv.AppendInt(b, v, 10), nil
	case uint64:
		return strconv.AppendUint(b, v, 10), nil
	case float32:
		return strconv.AppendFloat(b, float64(v), 'g', -1, 32), nil
	case float64:
		return strconv.AppendFloat(b, v, 'g', -1, 64), nil
	}
	return nil, fmt.Errorf("a %T cannot be sent", arg)
}

// maxDepth bounds arrays within arrays.
const maxDepth = 8

func (c *Conn) read(dst []byte, depth int) (Reply, error) {
	line, err := c.r.line()
	if err != nil {
		return Reply{}, noEOF(err)
	}
	body := line[1:]
	switch line[0] {
	case '+':
		b := c.alloc(len(body))
		copy(b, body)
		return Reply{Kind: Simple, Bytes: b}, nil
	case '-':
		code, message, _ := bytes.Cut(body, []byte(" "))
		return Reply{}, &Error{Code: string(code), Message: string(message)}
	case ':':
		n, err := parseReplyInt(body)
		return Reply{Kind: Int, Int: n}, err
	case '$':
		if string(body) == "-1" {
			return Reply{}, nil
		}
		return c.readBulk(body, dst)
	case '*':
		if string(body) == "-1" {
			return Reply{}, nil
		}
		n, err := parseInt(body)
		if err != nil || n < 0 || n > int64(c.r.limits.MaxArgs) || depth == maxDepth {
			return Reply{}, protocolError("an array of %.32q elements at depth %d", body, depth)
		}
		return c.readArray(int(n), dst, depth)
	}
	return Reply{}, protocolError("a reply that starts with %q", line[0])
}

func (c *Conn) readBulk(digits, dst []byte) (Reply, error) {
	n, err := c.r.bulkLen(digits)
	if err != nil {
		return Reply{}, err
	}
	b := dst
	if n != len(dst) || n == 0 {
		b = c.alloc(n)
	}
	if err := c.r.ReadFull(b); err != nil {
		return Reply{}, err
	}
	return Reply{Kind: Bulk, Bytes: b}, c.r.EndBulk()
}

// readArray reads all elements also when one is an error, so that the
// connection stays usable, and returns the first error.
func (c *Conn) readArray(n int, dst []byte, depth int) (Reply, error) {
	reply := Reply{Kind: Array, Elems: make([]Reply, 0, min(n, 64))}
	var refused *Error
	for range n {
		elem, err := c.read(dst, depth+1)
		var e *Error
		if errors.As(err, &e) {
			if refused == nil {
				refused = e
			}
		} else if err != nil {
			return Reply{}, err
		}
		reply.Elems = append(reply.Elems, elem)
	}
	if refused != nil {
		return Reply{}, refused
	}
	return reply, nil
}

// alloc returns n bytes of the arena, at a multiple of 8. What it returned
// before in this call stays as it is when the arena has to grow.
func (c *Conn) alloc(n int) []byte {
	start := (c.used + 7) &^ 7
	if start+n > len(c.arena) {
		c.arena = make([]byte, max(n, 2*start, large))
		start = 0
	}
	c.used = start + n
	return c.arena[start : start+n : start+n]
}

// parseReplyInt also reads the 19-digit numbers that an int64 can have.
func parseReplyInt(b []byte) (int64, error) {
	n, err := strconv.ParseInt(string(b), 10, 64)
	if err != nil {
		return 0, protocolError("an integer %.32q", b)
	}
	return n, nil
}
