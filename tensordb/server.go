package tensordb

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spirt-ml/spirt/resp"
)

// Access is what a token allows.
type Access uint8

// What a token can allow, each including the one before.
const (
	// ReadOnly allows the commands that change nothing.
	ReadOnly Access = iota
	// Function also allows TENSOR.ACCUMULATE.
	Function
	// All allows every command.
	All
)

// Token lets whoever shows its secret use the keys that start with Prefix.
type Token struct {
	Secret string // an empty secret never matches
	Prefix string // empty: all keys
	Access Access
}

// ServerConfig says how a Server behaves.
type ServerConfig struct {
	// Tokens are who may connect, beside who shows what Server.Sign made.
	Tokens []Token
	// Open lets connections use everything without a token: for a server that
	// only this user can reach.
	Open bool
	// Version is what INFO and HELLO tell of the program.
	Version string
	// SaveAs is the name of the checkpoint that SAVE and BGSAVE write. Empty:
	// they are refused.
	SaveAs string
	// Logger receives refused and failed connections. Nil: nothing is logged.
	Logger *slog.Logger
	// MaxBulk bounds the bytes of one tensor in a command or a reply. Zero:
	// 1 GiB.
	MaxBulk int64
	// MaxConns bounds the connections at one time. Zero: 1,024.
	MaxConns int
	// MaxTokenConns bounds those that show the same token. Zero: 64.
	MaxTokenConns int
	// AuthTimeout closes a connection that has not shown a token. Zero: 10
	// seconds.
	AuthTimeout time.Duration
	// CommandTimeout closes a connection on which one command or its reply
	// takes longer, however steadily bytes move. Zero: 5 minutes.
	CommandTimeout time.Duration
	// IdleTimeout closes a connection on which no command starts. Zero: 10
	// minutes.
	IdleTimeout time.Duration
	// TransferTimeout closes a connection on which, in the middle of a command
	// or a reply, no byte moves. Zero: 30 seconds.
	TransferTimeout time.Duration
}

func (c ServerConfig) withDefaults() ServerConfig {
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.MaxBulk <= 0 {
		c.MaxBulk = 1 << 30
	}
	if c.MaxConns <= 0 {
		c.MaxConns = 1024
	}
	if c.MaxTokenConns <= 0 {
		c.MaxTokenConns = 64
	}
	if c.AuthTimeout <= 0 {
		c.AuthTimeout = 10 * time.Second
	}
	if c.CommandTimeout <= 0 {
		c.CommandTimeout = 5 * time.Minute
	}
	if c.IdleTimeout <= 0 {
		c.IdleTimeout = 10 * time.Minute
	}
	if c.TransferTimeout <= 0 {
		c.TransferTimeout = 30 * time.Second
	}
	return c
}

// ServerStats counts what a server refused since it was made.
type ServerStats struct {
	Connections int    // open now
	TooMany     uint64 // connections refused because there were too many, in all or with one token
	WrongTokens uint64 // AUTH with a token that is none
	NotAllowed  uint64 // commands that their token does not allow
	Malformed   uint64 // connections closed for bytes that are not RESP, or too large
	TimedOut    uint64 // connections closed because nothing moved, or too slowly
}

// Server answers RESP commands on a DB.
type Server struct {
	db     *DB
	config ServerConfig
	hashes [][sha256.Size]byte // of the tokens' secrets
	key    [32]byte            // signs grants
	made   time.Time

	mu        sync.Mutex
	listeners map[net.Listener]bool
	conns     map[net.Conn]*conn        // nil: not served yet
	holders   map[[sha256.Size]byte]int // connections by hash of the token they showed
	stats     ServerStats
	closed    bool
	done      chan struct{}
	wg        sync.WaitGroup
	lastID    atomic.Int64
	saver     saver
}

// NewServer returns a server of db. Call Serve, and Close in the end; the
// server does not close db.
func NewServer(db *DB, config ServerConfig) *Server {
	s := &Server{
		db: db, config: config.withDefaults(), made: time.Now(),
		listeners: make(map[net.Listener]bool), conns: make(map[net.Conn]*conn), holders: make(map[[sha256.Size]byte]int), done: make(chan struct{}),
	}
	rand.Read(s.key[:]) // never fails
	for _, t := range config.Tokens {
		s.hashes = append(s.hashes, sha256.Sum256([]byte(t.Secret)))
	}
	return s
}

// Serve accepts connections until ln fails or Close is called, after which it
// returns nil. It closes ln.
func (s *Server) Serve(ln net.Listener) error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		ln.Close()
		return nil
	}
	s.listeners[ln] = true
	s.wg.Add(1)
	s.mu.Unlock()
	defer func() {
		ln.Close()
		s.mu.Lock()
		delete(s.listeners, ln)
		s.mu.Unlock()
		s.wg.Done()
	}()
	for {
		nc, err := ln.Accept()
		if err != nil {
			select {
			case <-s.done:
				return nil
			default:
			}
			if errors.Is(err, net.ErrClosed) {
				return fmt.Errorf("serving the tensor database: %w", err)
			}
			// Such as too many open files: others may close theirs.
			s.config.Logger.Warn("the database cannot accept a connection", "error", err)
			select {
			case <-s.done:
				return nil
			case <-time.After(100 * time.Millisecond):
			}
			continue
		}
		s.start(nc)
	}
}

// start serves nc in a goroutine of its own, which Close waits for.
func (s *Server) start(nc net.Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.closed:
		nc.Close()
	case len(s.conns) >= s.config.MaxConns:
		s.stats.TooMany++
		s.config.Logger.Warn("the database refuses a connection: too many", "limit", s.config.MaxConns)
		// The few bytes fit the socket's empty buffer; a deadline is enough.
		// TLS would need a handshake first: too much while everybody waits.
		if _, encrypted := nc.(*tls.Conn); !encrypted {
			nc.SetWriteDeadline(time.Now().Add(time.Second))
			nc.Write(resp.AppendError(nil, "ERR", "too many connections"))
			nc.Close()
		} else {
			nc.(*tls.Conn).NetConn().Close()
		}
	default:
		s.conns[nc] = nil
		s.wg.Add(1)
		go func() {
			defer s.wg.Done()
			s.serve(nc)
			s.mu.Lock()
			delete(s.conns, nc)
			s.mu.Unlock()
		}()
	}
}

// Close stops accepting, cuts all connections and waits for their goroutines.
func (s *Server) Close() error {
	s.mu.Lock()
	if !s.closed {
		s.closed = true
		close(s.done)
	}
	for ln := range s.listeners {
		ln.Close()
	}
	for nc := range s.conns {
		nc.Close()
	}
	s.mu.Unlock()
	s.wg.Wait()
	return nil
}

// Stats returns the counts.
func (s *Server) Stats() ServerStats {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stats.Connections = len(s.conns)
	return s.stats
}

func (s *Server) count(f func(*ServerStats)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f(&s.stats)
}

// hold counts a connection as one that shows a token instead of another, zero
// for none, and reports whether there may be as many.
func (s *Server) hold(token, instead [sha256.Size]byte) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	none := [sha256.Size]byte{}
	if token == instead {
		return true
	}
	if token != none && s.holders[token] >= s.config.MaxTokenConns {
		s.stats.TooMany++
		return false
	}
	if token != none {
		s.holders[token]++
	}
	if instead != none {
		if s.holders[instead]--; s.holders[instead] == 0 {
			delete(s.holders, instead)
		}
	}
	return true
}

// authenticate returns the token with this secret. It takes the same time
// whichever it is, or if it is none.
func (s *Server) authenticate(secret []byte) *Token {
	hash := sha256.Sum256(secret)
	found := -1
	for i := range s.hashes {
		equal := subtle.ConstantTimeCompare(hash[:], s.hashes[i][:])
		found = subtle.ConstantTimeSelect(equal, i, found)
	}
	if found < 0 || len(secret) == 0 {
		return nil
	}
	return &s.config.Tokens[found]
}

// timedConn sets the deadline anew before each read and write, so that what
// counts is whether bytes move.
type timedConn struct {
	net.Conn
	readTimeout, writeTimeout time.Duration
	until                     time.Time // the deadline whatever moves; zero: none
}

// deadline is the next one of an operation that may take d.
func (c *timedConn) deadline(d time.Duration) time.Time {
	at := time.Now().Add(d)
	if !c.until.IsZero() && c.until.Before(at) {
		return c.until
	}
	return at
}

func (c *timedConn) Read(p []byte) (int, error) {
	if err := c.Conn.SetReadDeadline(c.deadline(c.readTimeout)); err != nil {
		return 0, err
	}
	return c.Conn.Read(p)
}

func (c *timedConn) Write(p []byte) (int, error) {
	if err := c.Conn.SetWriteDeadline(c.deadline(c.writeTimeout)); err != nil {
		return 0, err
	}
	return c.Conn.Write(p)
}

// Bounds of what is not a tensor's bytes.
const (
	maxArg        = 4 << 10 // one argument
	maxArgs       = 1 << 16 // arguments of a command
	maxArgBytes   = 4 << 20 // all of them
	maxAuthErrors = 4       // wrong tokens on one connection
	flushAt       = 64 << 10
	pieceSize     = 1 << 20 // of a reply, to be written in one TransferTimeout
)

// strangerLimits bound what is read before a token is shown.
var strangerLimits = resp.Limits{MaxArgs: 16, MaxBulk: maxArg}

// conn is one connection.
type conn struct {
	server *Server
	db     *DB
	nc     timedConn
	r      *resp.Reader
	token  *Token // nil: not authenticated, or by a grant
	grant  *signedGrant
	shown  [sha256.Size]byte // hash of the token or grant; zero: none
	opened time.Time

	out        []byte // replies not written yet
	version    int    // of RESP
	id         int64
	name       string // by CLIENT SETNAME
	last       atomic.Pointer[Command]
	text       []byte // memory of args
	ends       []int
	args       [][]byte // of the command, without those not read yet
	unread     int      // arguments of the command still in the stream
	payload    int      // bytes of the payload still in the stream, -1 for none
	call       Call
	authErrors int
	quit       bool
}

func (s *Server) serve(nc net.Conn) {
	c := &conn{server: s, db: s.db, opened: time.Now(), version: 2, id: s.lastID.Add(1)}
	s.mu.Lock()
	s.conns[nc] = c
	s.mu.Unlock()
	if s.config.Open {
		c.token = &Token{Access: All}
	}
	c.nc = timedConn{Conn: nc, readTimeout: s.config.IdleTimeout, writeTimeout: s.config.TransferTimeout}
	defer func() { s.hold([sha256.Size]byte{}, c.shown) }()
	c.r = resp.NewReader(&c.nc, strangerLimits)
	if c.known() {
		c.welcome()
	}
	defer nc.Close()
	defer func() {
		// A fault in one command must not take the peer along.
		if p := recover(); p != nil {
			s.config.Logger.Error("a database command failed badly", "panic", p, "stack", string(debug.Stack()))
		}
	}()
	err := c.loop()
	if errors.Is(err, os.ErrDeadlineExceeded) {
		s.count(func(t *ServerStats) { t.TimedOut++ })
	}
	if errors.Is(err, resp.ErrProtocol) {
		code := "ERR"
		if errors.Is(err, resp.ErrTooLarge) {
			code = "TOOLARGE"
		}
		c.out = resp.AppendError(c.out, code, err.Error())
		s.count(func(t *ServerStats) { t.Malformed++ })
		s.config.Logger.Warn("the database closes a connection", "error", err)
	}
	if c.flush() == nil && (err == nil || errors.Is(err, resp.ErrProtocol)) {
		c.linger()
	}
}

// linger lets the other side read the last reply: closing a connection with
// unread bytes may destroy what was sent.
func (c *conn) linger() {
	half, ok := c.nc.Conn.(interface{ CloseWrite() error })
	if !ok || half.CloseWrite() != nil {
		return
	}
	c.nc.Conn.SetReadDeadline(time.Now().Add(time.Second))
	io.Copy(io.Discard, io.LimitReader(c.nc.Conn, pieceSize))
}

// loop answers commands until the connection ends. It returns nil after QUIT.
func (c *conn) loop() error {
	for !c.quit {
		if c.r.Buffered() == 0 || len(c.out) >= flushAt {
			if err := c.flush(); err != nil {
				return err
			}
		}
		c.nc.readTimeout = c.server.config.IdleTimeout
		c.nc.until = time.Time{}
		if !c.known() { // all that is not a token has to come in time
			c.nc.until = c.opened.Add(c.server.config.AuthTimeout)
		}
		if err := c.r.Wait(); err != nil {
			return err
		}
		c.nc.readTimeout = c.server.config.TransferTimeout
		if c.known() {
			c.nc.until = time.Now().Add(c.server.config.CommandTimeout)
		}
		if err := c.command(); err != nil {
			return err
		}
	}
	return nil
}

// known reports whether a token was shown.
func (c *conn) known() bool { return c.token != nil || c.grant != nil }

// command reads and answers one command. An error ends the connection.
func (c *conn) command() error {
	n, err := c.r.Command()
	if err != nil {
		return err
	}
	c.args, c.ends, c.text, c.unread, c.payload = c.args[:0], c.ends[:0], c.text[:0], n, -1
	if err := c.readArg(); err != nil {
		return err
	}
	at := len(c.out)
	if err := c.answer(n); err != nil {
		var refused *resp.Error
		if !errors.As(err, &refused) {
			return err
		}
		if len(c.out) >= at {
			c.out = c.out[:at] // of an answer that was begun
		}
		if refused.Code == "NOPERM" {
			c.server.count(func(t *ServerStats) { t.NotAllowed++ })
		}
		c.out = resp.AppendError(c.out, refused.Code, refused.Message)
	}
	if c.payload >= 0 {
		if err := c.r.Discard(c.payload); err != nil {
			return err
		}
		if err := c.r.EndBulk(); err != nil {
			return err
		}
	}
	for c.unread > 0 {
		if err := c.skipArg(); err != nil {
			return err
		}
	}
	return nil
}

// answer finds the command of n arguments, reads those that are not a
// tensor's bytes, checks that the token allows it, and runs it. A *resp.Error
// is the reply; another error ends the connection.
func (c *conn) answer(n int) error {
	c.args = append(c.args, c.text)
	name, cmd := FindCommand(c.args[0])
	if !c.known() && (cmd == nil || !cmd.stranger) {
		return refuse("NOAUTH", "Authentication required: send AUTH with the token first")
	}
	if cmd == nil {
		return refuse("ERR", "unknown command %.32q", name)
	}
	if err := cmd.CheckArgs(n, c.args[0]); err != nil {
		return err
	}
	keep := 0
	if cmd.Payload {
		keep = 1
	}
	for c.unread > keep {
		if err := c.readArg(); err != nil {
			return err
		}
	}
	c.args = c.args[:0]
	at := 0
	for _, end := range c.ends {
		c.args = append(c.args, c.text[at:end])
		at = end
	}
	if c.grant != nil {
		if err := c.grant.allows(name, c.args); err != nil {
			return err
		}
	}
	if c.token != nil {
		if c.token.Access < cmd.Access {
			return refuse("NOPERM", "this token may not use %s", name)
		}
		if err := cmd.Keys(c.args[1:], c.checkKey); err != nil {
			return err
		}
	}
	c.last.Store(cmd)
	if cmd.ServerOnly() {
		err := cmd.serve(c, c.args[1:])
		if code := errorCode(err); code != "" {
			return &resp.Error{Code: code, Message: err.Error()}
		}
		return err
	}
	if cmd.Waits { // nothing more is read, and what is answered is on its way
		if err := c.flush(); err != nil {
			return err
		}
	}
	c.call = Call{DB: c.db, Args: c.args[1:], Payload: c, Reply: c, MaxReply: c.server.config.MaxBulk, Done: c.server.done}
	return cmd.Run(&c.call)
}

// checkKey refuses a key that the token's prefix does not cover.
func (c *conn) checkKey(key []byte) error {
	if !strings.HasPrefix(string(key), c.token.Prefix) {
		return refuse("NOPERM", "this token may not use key %.80q", key)
	}
	return nil
}

// Size reads the header of the payload. With Read it makes conn a Payload.
func (c *conn) Size() (int, error) {
	size, err := c.r.Bulk()
	if err != nil {
		return 0, err
	}
	c.unread--
	c.payload = size
	return size, nil
}

// Read reads the payload to the end of the command.
func (c *conn) Read(data []byte, check func(part []byte, offset int)) error {
	c.payload = -1
	if check == nil {
		if err := c.r.ReadFull(data); err != nil {
			return err
		}
		return c.r.EndBulk()
	}
	for at, checked := 0, 0; at < len(data); {
		n, err := c.r.ReadSome(data[at:])
		if err != nil {
			return err
		}
		at += n
		whole := at &^ 3
		check(data[checked:whole], checked)
		checked = whole
	}
	return c.r.EndBulk()
}

// The methods of a Replier.

func (c *conn) Simple(s string)  { c.out = resp.AppendSimple(c.out, s) }
func (c *conn) Int(n int64)      { c.out = resp.AppendInt(c.out, n) }
func (c *conn) Double(x float64) { c.out = resp.AppendDouble(c.out, c.version, x) }
func (c *conn) Float17(x float64) {
	if c.version < 3 {
		c.Text(Float17(x))
	} else {
		c.out = append(append(append(c.out, ','), Float17(x)...), "\r\n"...)
	}
}
func (c *conn) Bulk(b []byte) { c.out = resp.AppendBulk(c.out, b) }
func (c *conn) Text(s string) { c.out = resp.AppendBulkString(c.out, s) }
func (c *conn) Nil()          { c.out = resp.AppendNull(c.out, c.version) }
func (c *conn) Array(n int)   { c.out = resp.AppendArray(c.out, n) }
func (c *conn) Map(n int)     { c.out = resp.AppendMap(c.out, c.version, n) }

// Tensor writes large data from where it lies.
func (c *conn) Tensor(data []byte) error {
	if len(data) < flushAt {
		c.out = resp.AppendBulk(c.out, data)
		return nil
	}
	c.out = resp.AppendBulkHeader(c.out, len(data))
	if err := c.flushWith(data); err != nil {
		return err
	}
	c.out = append(c.out, "\r\n"...)
	return nil
}

// readArg reads one argument into the memory of arguments.
func (c *conn) readArg() error {
	size, err := c.r.Bulk()
	if err != nil {
		return err
	}
	if size > maxArg || len(c.text)+size > maxArgBytes {
		return fmt.Errorf("%w: argument %d has %d bytes, at most %d are allowed, and %d in all", resp.ErrTooLarge, len(c.ends), size, maxArg, maxArgBytes)
	}
	start := len(c.text)
	c.text = append(c.text, make([]byte, size)...)
	if err := c.r.ReadFull(c.text[start:]); err != nil {
		return err
	}
	c.ends = append(c.ends, len(c.text))
	c.unread--
	return c.r.EndBulk()
}

// skipArg reads over one argument, such as the bytes of a refused tensor.
func (c *conn) skipArg() error {
	size, err := c.r.Bulk()
	if err != nil {
		return err
	}
	if err := c.r.Discard(size); err != nil {
		return err
	}
	c.unread--
	return c.r.EndBulk()
}

func (c *conn) flush() error { return c.flushWith(nil) }

// flushWith writes the replies and then data, which is not copied, in pieces
// that each may take the TransferTimeout.
func (c *conn) flushWith(data []byte) error {
	piece := data[:min(len(data), pieceSize)]
	if len(c.out) > 0 {
		buffers := net.Buffers{c.out, piece}
		if err := c.nc.SetWriteDeadline(c.nc.deadline(c.nc.writeTimeout)); err != nil {
			return err
		}
		if _, err := buffers.WriteTo(c.nc.Conn); err != nil {
			return err
		}
		c.out = c.out[:0]
		data = data[len(piece):]
	}
	for len(data) > 0 {
		piece := data[:min(len(data), pieceSize)]
		if _, err := c.nc.Write(piece); err != nil {
			return err
		}
		data = data[len(piece):]
	}
	return nil
}
