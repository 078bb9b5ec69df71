// Package resp speaks RESP2, the protocol of Redis, with payloads that are
// tens of megabytes of numbers.
//
// A server reads commands with a Reader, which hands out headers one at a time
// so that a large argument can go from the socket straight into the memory
// where it is used, and answers with the Append functions, whose buffer the
// caller owns. A caller of a server uses Dial and Conn.Do.
//
// The Append functions also write RESP3, which differs in replies only.
//
// Everything read is bounded by Limits before memory is allocated. Inline
// commands are not spoken, and Conn asks for RESP2.
package resp

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"math"
	"strconv"
)

// Error is an error reply. Code is its first word, such as NOKEY.
type Error struct {
	Code    string
	Message string
}

// Error returns the reply as it came, without the leading minus.
func (e *Error) Error() string {
	if e.Message == "" {
		return e.Code
	}
	return e.Code + " " + e.Message
}

// ErrProtocol is wrapped by every error of a Reader or Conn that means that
// the other side does not speak RESP2 or exceeds a limit. The connection
// cannot be used any more.
var ErrProtocol = errors.New("protocol error")

// ErrTooLarge is the ErrProtocol of something that exceeds a limit.
var ErrTooLarge = fmt.Errorf("%w: too large", ErrProtocol)

func protocolError(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrProtocol, fmt.Sprintf(format, args...))
}

// Limits bound what a Reader accepts.
type Limits struct {
	MaxArgs int   // arguments of a command, or elements of an array; zero: 65,536
	MaxBulk int64 // bytes of one bulk string; zero: 512 MiB, as in Redis
}

func (l Limits) withDefaults() Limits {
	if l.MaxArgs == 0 {
		l.MaxArgs = 1 << 16
	}
	if l.MaxBulk == 0 {
		l.MaxBulk = 512 << 20
	}
	return l
}

// maxLine bounds a header, a simple string and an error: more than any of
// ours has.
const maxLine = 8 << 10

// Reader reads the parts of commands and replies. It is not safe for
// concurrent use. After an error other than of the caller's making, the stream
// is of no more use.
type Reader struct {
	br     *bufio.Reader
	limits Limits
}

// NewReader returns a Reader of r.
func NewReader(r io.Reader, limits Limits) *Reader {
	return &Reader{br: bufio.NewReaderSize(r, 2*maxLine), limits: limits.withDefaults()}
}

// SetLimits sets the limits of what is read from now on.
func (r *Reader) SetLimits(limits Limits) { r.limits = limits.withDefaults() }

// Buffered returns how many bytes have arrived and are not read yet.
func (r *Reader) Buffered() int { return r.br.Buffered() }

// Wait blocks until the first byte of the next part has arrived.
func (r *Reader) Wait() error {
	_, err := r.br.Peek(1)
	return err
}

// Command reads the header of a command and returns how many arguments, its
// name included, follow as bulk strings. An empty command is an error.
func (r *Reader) Command() (int, error) {
	line, err := r.line()
	if err != nil {
		return 0, err
	}
	if line[0] != '*' {
		return 0, protocolError("expected '*', got %q; inline commands are not spoken", line[0])
	}
	n, err := parseInt(line[1:])
	if err != nil || n < 1 || n > int64(r.limits.MaxArgs) {
		return 0, protocolError("a command of %.32q arguments, 1 to %d are allowed", line[1:], r.limits.MaxArgs)
	}
	return int(n), nil
}

// Bulk reads the header of a bulk string and returns its length. Read it with
// ReadFull or Discard, then call EndBulk.
func (r *Reader) Bulk() (int, error) {
	line, err := r.line()
	if err != nil {
		return 0, noEOF(err)
	}
	if line[0] != '$' {
		return 0, protocolError("expected '$', got %q", line[0])
	}
	return r.bulkLen(line[1:])
}

func (r *Reader) bulkLen(digits []byte) (int, error) {
	n, err := parseInt(digits)
	if err != nil || n < 0 {
		return 0, protocolError("a bulk string of %.32q bytes", digits)
	}
	if n > r.limits.MaxBulk || n > math.MaxInt {
		return 0, fmt.Errorf("%w: a bulk string of %d bytes, at most %d are allowed", ErrTooLarge, n, r.limits.MaxBulk)
	}
	return int(n), nil
}

// ReadFull fills p with the next bytes of a bulk string. Large parts go from
// the connection into p without another copy.
func (r *Reader) ReadFull(p []byte) error {
	_, err := io.ReadFull(r.br, p)
	return noEOF(err)
}

// ReadSome reads at least one byte of a bulk string into p, and as many as have
// arrived, for whoever wants to work on them while they are in the cache. p
// must not be longer than what is left of the bulk string.
func (r *Reader) ReadSome(p []byte) (int, error) {
	n, err := io.ReadAtLeast(r.br, p, 1)
	return n, noEOF(err)
}

// Discard skips n bytes of a bulk string.
func (r *Reader) Discard(n int) error {
	_, err := r.br.Discard(n)
	return noEOF(err)
}

// EndBulk reads the two bytes that end a bulk string.
func (r *Reader) EndBulk() error {
	var end [2]byte
	if err := r.ReadFull(end[:]); err != nil {
		return err
	}
	if end != [2]byte{'\r', '\n'} {
		return protocolError("a bulk string ends with %q, not CR LF: its length is wrong", end[:])
	}
	return nil
}

// line returns the next line without its CR LF, at least one byte. It is valid
// until the next read.
func (r *Reader) line() ([]byte, error) {
	line, err := r.br.ReadSlice('\n')
	if err == bufio.ErrBufferFull || len(line) > maxLine {
		return nil, protocolError("a line of more than %d bytes", maxLine)
	}
	if err != nil {
		if err == io.EOF && len(line) > 0 {
			err = io.ErrUnexpectedEOF
		}
		return nil, err
	}
	if len(line) < 3 || line[len(line)-2] != '\r' {
		return nil, protocolError("a line that is empty or does not end with CR LF")
	}
	return line[:len(line)-2], nil
}

// noEOF says that the stream ended in the middle of something.
func noEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// parseInt reads a decimal number without allocating.
func parseInt(b []byte) (int64, error) {
	digits, negative := b, false
	if len(b) > 0 && b[0] == '-' {
		digits, negative = b[1:], true
	}
	if len(digits) == 0 || len(digits) > 18 {
		return 0, strconv.ErrSyntax
	}
	n := int64(0)
	for _, c := range digits {
		if c < '0' || c > '9' {
			return 0, strconv.ErrSyntax
		}
		n = 10*n + int64(c-'0')
	}
	if negative {
		n = -n
	}
	return n, nil
}

// AppendSimple appends a simple string, which must not contain CR or LF.
func AppendSimple(b []byte, s string) []byte {
	b = append(b, '+')
	b = append(b, s...)
	return append(b, "\r\n"...)
}

// AppendError appends an error reply. Line ends in the message become spaces.
func AppendError(b []byte, code, message string) []byte {
	b = append(b, '-')
	b = append(b, code...)
	b = append(b, ' ')
	for i := range min(len(message), maxLine/2) {
		c := message[i]
		if c == '\r' || c == '\n' {
			c = ' '
		}
		b = append(b, c)
	}
	return append(b, "\r\n"...)
}

// AppendInt appends an integer reply.
func AppendInt(b []byte, n int64) []byte { return appendHeader(b, ':', n) }

// AppendArray appends the header of an array (or a command) of n elements.
func AppendArray(b []byte, n int) []byte { return appendHeader(b, '*', int64(n)) }

// AppendBulkHeader appends the header of a bulk string of n bytes. The bytes
// and a CR LF must follow.
func AppendBulkHeader(b []byte, n int) []byte { return appendHeader(b, '$', int64(n)) }

// AppendBulk appends a bulk string.
func AppendBulk(b, data []byte) []byte {
	b = AppendBulkHeader(b, len(data))
	b = append(b, data...)
	return append(b, "\r\n"...)
}

// AppendBulkString appends a bulk string.
func AppendBulkString(b []byte, s string) []byte {
	b = AppendBulkHeader(b, len(s))
	b = append(b, s...)
	return append(b, "\r\n"...)
}

// AppendNil appends the nil bulk string.
func AppendNil(b []byte) []byte { return append(b, "$-1\r\n"...) }

func appendHeader(b []byte, kind byte, n int64) []byte {
	b = append(b, kind)
	b = strconv.AppendInt(b, n, 10)
	return append(b, "\r\n"...)
}

// What RESP3 has more. The functions take the version that is spoken, and write
// what RESP2 has for it: an array of keys and values for a map, a bulk string
// for a double.

// AppendMap appends the header of a map of n pairs, whose keys and values must
// follow in turn.
func AppendMap(b []byte, version, n int) []byte {
	if version < 3 {
		return AppendArray(b, 2*n)
	}
	return appendHeader(b, '%', int64(n))
}

// AppendDouble appends a number with as many digits as tell it from others.
func AppendDouble(b []byte, version int, x float64) []byte {
	text := strconv.FormatFloat(x, 'g', -1, 64)
	switch {
	case math.IsInf(x, 1):
		text = "inf"
	case math.IsInf(x, -1):
		text = "-inf"
	case math.IsNaN(x):
		text = "nan"
	}
	if version < 3 {
		return AppendBulkString(b, text)
	}
	b = append(b, ',')
	b = append(b, text...)
	return append(b, "\r\n"...)
}

// AppendNull appends what stands for nothing.
func AppendNull(b []byte, version int) []byte {
	if version < 3 {
		return AppendNil(b)
	}
	return append(b, "_\r\n"...)
}
