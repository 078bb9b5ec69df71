package resp

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"testing/iotest"
	"time"
)

// readCommand reads one whole command.
func readCommand(r *Reader) ([]string, error) {
	n, err := r.Command()
	if err != nil {
		return nil, err
	}
	args := []string{}
	for range n {
		size, err := r.Bulk()
		if err != nil {
			return nil, err
		}
		b := make([]byte, size)
		if err := r.ReadFull(b); err != nil {
			return nil, err
		}
		if err := r.EndBulk(); err != nil {
			return nil, err
		}
		args = append(args, string(b))
	}
	return args, nil
}

func TestReadCommand(t *testing.T) {
	in := "*2\r\n$4\r\nPING\r\n$0\r\n\r\n*1\r\n$6\r\na\r\nb\r\n\r\n"
	r := NewReader(iotest.OneByteReader(strings.NewReader(in)), Limits{})
	for _, want := range []string{"PING|", "a\r\nb\r\n"} {
		args, err := readCommand(r)
		if err != nil || strings.Join(args, "|") != want {
			t.Fatalf("%q, %v, want %q", args, err, want)
		}
	}
	if _, err := readCommand(r); err != io.EOF {
		t.Fatalf("at the end: %v", err)
	}
}

func TestReadCommandRefuses(t *testing.T) {
	limits := Limits{MaxArgs: 4, MaxBulk: 10}
	for in, want := range map[string]error{
		"PING\r\n":                       ErrProtocol,
		"\r\n":                           ErrProtocol,
		"*0\r\n":                         ErrProtocol,
		"*-1\r\n":                        ErrProtocol,
		"*5\r\n":                         ErrProtocol,
		"*1x\r\n":                        ErrProtocol,
		"*99999999999999999999\r\n":      ErrProtocol,
		"*1\n$4\r\nPING\r\n":             ErrProtocol,
		"*1\r\n:1\r\n":                   ErrProtocol,
		"*1\r\n$-1\r\n":                  ErrProtocol,
		"*1\r\n$11\r\n":                  ErrTooLarge,
		"*1\r\n$2147483648\r\n":          ErrTooLarge,
		"*1\r\n$3\r\nPING\r\n":           ErrProtocol,
		strings.Repeat("*", 100_000):     ErrProtocol,
		"*1":                             io.ErrUnexpectedEOF,
		"*1\r\n":                         io.ErrUnexpectedEOF,
		"*1\r\n$4\r\nPI":                 io.ErrUnexpectedEOF,
		"*1\r\n$4\r\nPING":               io.ErrUnexpectedEOF,
		"*1\r\n$4\r\nPING\r":             io.ErrUnexpectedEOF,
		"":                               io.EOF,
		"\x00\x01\x02\xff\xfe\r\n\r\n\r": ErrProtocol,
	} {
		_, err := readCommand(NewReader(strings.NewReader(in), limits))
		if !errors.Is(err, want) {
			t.Errorf("%.40q: %v, want %v", in, err, want)
		}
	}
}

// serve answers a connection with what reply returns for each command, or only
// for the first one.
func serve(t *testing.T, once bool, reply func(args []string) string) (dial func() *Conn) {
	return func() *Conn {
		ours, theirs := net.Pipe()
		done := make(chan struct{})
		go func() {
			defer close(done)
			defer theirs.Close()
			r := NewReader(theirs, Limits{})
			for {
				args, err := readCommand(r)
				if err != nil {
					return
				}
				if _, err := io.WriteString(theirs, reply(args)); err != nil || once {
					return
				}
			}
		}()
		c := &Conn{nc: ours, r: NewReader(ours, Limits{}), timeout: time.Minute}
		t.Cleanup(func() { c.Close(); <-done })
		return c
	}
}

func TestDo(t *testing.T) {
	big := bytes.Repeat([]byte("0123456789"), 10_000)
	dial := serve(t, false, func(args []string) string {
		switch args[0] {
		case "ECHO":
			return string(AppendBulkString(nil, strings.Join(args[1:], " ")))
		case "ARRAY":
			b := AppendArray(nil, 4)
			b = AppendSimple(b, "OK")
			b = AppendInt(b, -7)
			b = AppendNil(b)
			return string(AppendBulk(b, big))
		case "NEST":
			return "*2\r\n-ERR inside\r\n*1\r\n:5\r\n"
		}
		return string(AppendError(nil, "ERR", "unknown\r\ncommand"))
	})
	c, ctx := dial(), t.Context()
	r, err := c.Do(ctx, "ECHO", "a", []byte("b"), 1, int64(-2), uint64(3), float32(0.1), 0.25)
	if err != nil || string(r.Bytes) != "a b 1 -2 3 0.1 0.25" {
		t.Fatalf("%q, %v", r.Bytes, err)
	}
	r, err = c.Do(ctx, "ECHO", big, "x", big)
	if err != nil || string(r.Bytes) != string(big)+" x "+string(big) {
		t.Fatalf("%d bytes, %v", len(r.Bytes), err)
	}
	for range 3 { // memory of the first reply is used again
		r, err = c.Do(ctx, "ARRAY")
		if err != nil || len(r.Elems) != 4 || string(r.Elems[0].Bytes) != "OK" || r.Elems[1].Int != -7 || r.Elems[2].Kind != Nil || !bytes.Equal(r.Elems[3].Bytes, big) {
			t.Fatalf("%+v, %v", r.Elems[:3], err)
		}
	}
	dst := make([]byte, len(big))
	r, err = c.DoInto(ctx, dst, "ARRAY")
	if err != nil || &r.Elems[3].Bytes[0] != &dst[0] || !bytes.Equal(dst, big) {
		t.Fatalf("DoInto: %v", err)
	}
	var e *Error
	if _, err := c.Do(ctx, "NO"); !errors.As(err, &e) || e.Code != "ERR" || e.Message != "unknown  command" {
		t.Fatalf("error reply: %v", err)
	}
	if _, err := c.Do(ctx, "NEST"); !errors.As(err, &e) || e.Message != "inside" {
		t.Fatalf("error in an array: %v", err)
	}
	if _, err := c.Do(ctx, "ECHO", struct{}{}); err == nil {
		t.Fatal("a struct was sent")
	}
	if r, err := c.Do(ctx, "ECHO", "still"); err != nil || string(r.Bytes) != "still" {
		t.Fatalf("after errors: %q, %v", r.Bytes, err)
	}
}

func TestDoCancelled(t *testing.T) {
	arrived, release := make(chan struct{}), make(chan struct{})
	dial := serve(t, false, func(args []string) string {
		close(arrived)
		<-release
		return ""
	})
	c := dial()
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-arrived; cancel() }()
	_, err := c.Do(ctx, "WAIT")
	close(release)
	if !errors.Is(err, context.Canceled) {
		t.Fatalf("cancelled: %v", err)
	}
	if _, err := c.Do(t.Context(), "PING"); !errors.Is(err, context.Canceled) {
		t.Fatalf("the connection is used after it failed: %v", err)
	}
}

// TestReplies reads what a broken or hostile server could answer.
func TestReplies(t *testing.T) {
	for in, want := range map[string]error{
		"$99999999999\r\n":                     ErrTooLarge,
		"*99999999\r\n":                        ErrProtocol,
		strings.Repeat("*1\r\n", 9) + ":1\r\n": ErrProtocol,
		":12x\r\n":                             ErrProtocol,
		"?\r\n":                                ErrProtocol,
		"%1\r\n":                               ErrProtocol,
		"$3\r\nabcd\r\n":                       ErrProtocol,
		"$3\r\nab":                             io.ErrUnexpectedEOF,
		"":                                     io.ErrUnexpectedEOF,
	} {
		dial := serve(t, true, func([]string) string { return in })
		if _, err := dial().Do(t.Context(), "X"); !errors.Is(err, want) {
			t.Errorf("%q: %v, want %v", in, err, want)
		}
	}
}

func FuzzReader(f *testing.F) {
	f.Add([]byte("*2\r\n$4\r\nPING\r\n$0\r\n\r\n"))
	f.Add([]byte("*1\r\n$-1\r\n"))
	f.Fuzz(func(t *testing.T, in []byte) {
		r := NewReader(bytes.NewReader(in), Limits{MaxArgs: 8, MaxBulk: 1 << 10})
		for {
			args, err := readCommand(r)
			if err != nil {
				return
			}
			again := AppendArray(nil, len(args))
			for _, a := range args {
				again = AppendBulkString(again, a)
			}
			back, err := readCommand(NewReader(bytes.NewReader(again), Limits{}))
			if err != nil || strings.Join(back, "\x00") != strings.Join(args, "\x00") {
				t.Fatalf("%q comes back as %q, %v", args, back, err)
			}
		}
	})
}

func FuzzReply(f *testing.F) {
	f.Add([]byte("*4\r\n$7\r\nfloat32\r\n*1\r\n:2\r\n:5\r\n$8\r\nabcdefgh\r\n"))
	f.Add([]byte("-NOKEY \"x\"\r\n"))
	f.Fuzz(func(t *testing.T, in []byte) {
		c := &Conn{r: NewReader(bytes.NewReader(in), Limits{MaxArgs: 8, MaxBulk: 1 << 10})}
		dst := make([]byte, 8)
		for {
			if _, err := c.read(dst, 0); err != nil {
				var e *Error
				if !errors.As(err, &e) {
					return
				}
			}
		}
	})
}
