package p2p

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync/atomic"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
)

const (
	helloBeats = 20               // heartbeat intervals from a connection to hellos in both directions
	writeTime  = 10 * time.Second // one write; a silent member is noticed earlier
	batchSize  = 32 << 10         // frames are gathered up to this before a write
)

// session is one connection to a member with its message stream. Fields below
// the line are guarded by Host.mu.
type session struct {
	member  *member
	conn    network.Conn
	dialled bool
	done    chan struct{}       // closed when the session is dropped
	inbound chan network.Stream // the message stream that the dialler opened
	stream  network.Stream      // set before the session is up
	heard   atomic.Int64        // Host.now of the last sign of life
	waiting atomic.Bool         // its reader waits for room among the events, or is paced
	work    bucket              // what it brought that is of no use; its reader's
	wake    chan struct{}       // tells the writer that there is something
	link    link                // how fast chunks come over it

	// ----
	up, dropped bool
	upAt        time.Duration
	run         uint64 // the run the member's hello named
	surplus     bool   // it is to be closed in favour of another
	peers       bitset // whom the member is connected to; nil until it says
	queue       []outFrame
	wanted      []*keptMessage
	mute        bool           // the other side wants only offers of what others sign
	muted       bool           // this side said so
	late        []*keptMessage // to be offered to a mute side
	got, fresh  int            // messages of others that came, and those that were new
	known       map[*keptMessage]knowledge
	held        []heldMessage // that could not be judged yet
	heldBytes   int
	lost        bool          // some such were dropped
	offerAll    bool          // the other side asked for that
	offered     time.Duration // when everything was offered to it
}

// knowledge is what a session's other side knows of a kept message.
type knowledge uint8

const (
	offered knowledge = iota + 1 // it has it, or may ask for it
	sent                         // it was sent, or came from there
)

type outFrame struct {
	kind byte
	data []byte // shared, never changed
}

// errProtocol marks what no peer that speaks the protocol sends.
type errProtocol struct{ error }

func (e errProtocol) Unwrap() error { return e.error }

// connected starts a session on a new connection.
func (h *Host) connected(ctx context.Context, c network.Conn) {
	s := &session{
		conn:    c,
		dialled: c.Stat().Direction == network.DirOutbound,
		inbound: make(chan network.Stream, 1), wake: make(chan struct{}, 1),
		known: make(map[*keptMessage]knowledge), done: make(chan struct{}),
	}
	s.heard.Store(int64(h.now()))
	h.mu.Lock()
	defer h.mu.Unlock()
	if s.member = h.roster.of[c.RemotePeer()]; s.member == nil {
		if h.turnGuestLocked(c.Stat().Direction, c.RemoteMultiaddr()) == "" {
			h.welcomeLocked(c)
		} else {
			h.closeLocked(c)
		}
		return
	}
	if s.member.turnedAway(time.Now()) { // since its handshake
		h.closeLocked(c)
		return
	}
	if !h.spawnLocked(func() { h.runSession(ctx, s) }) {
		c.Close()
		return
	}
	h.sessions[c] = s
}

func (h *Host) runSession(ctx context.Context, s *session) {
	r, err := h.greet(ctx, s)
	if err == nil {
		err = h.read(s, r)
	}
	var bad errProtocol
	if errors.As(err, &bad) {
		if errors.Is(err, errOversize) {
			h.counts.oversize.Add(1)
		} else {
			h.counts.malformed.Add(1)
		}
	}
	h.mu.Lock()
	if errors.As(err, &bad) && !h.closed {
		h.refuseLocked(s.member, "it sent "+err.Error())
	}
	h.dropLocked(s, err.Error())
	delete(h.sessions, s.conn)
	s.member.poke()
	if h.closed && len(h.sessions) == 0 {
		close(h.gone)
	}
	h.mu.Unlock()
	s.conn.Close()
}

// dropLocked ends a session: its goroutines return soon after.
func (h *Host) dropLocked(s *session, why string) {
	if s.dropped {
		return
	}
	s.dropped = true
	close(s.done)
	s.queue, s.wanted, s.known, s.held, s.late = nil, nil, nil, nil, nil
	h.wg.Go(func() { s.conn.Close() }) // ends reads and writes; waits for yamux
	m := s.member
	h.cfg.Logger.Debug("p2p: session ended", "member", m.index, "reason", why, "up", s.up)
	if !s.up {
		return
	}
	s.up = false
	for i, o := range m.sessions {
		if o == s {
			m.sessions = append(m.sessions[:i], m.sessions[i+1:]...)
			break
		}
	}
	if h.now()-s.upAt > missedHeartbeats*h.cfg.Heartbeat {
		m.fresh = true // it worked: no back-off from earlier failures
	}
	if len(m.sessions) == 0 {
		m.heard = max(m.heard, time.Duration(s.heard.Load()))
		h.noticeLocked(m, why)
		h.linksChanged()
		m.poke()
	}
}

// greet gets the message stream and exchanges hellos on it. Then the session
// is up, and its writer runs.
func (h *Host) greet(ctx context.Context, s *session) (*bufio.Reader, error) {
	ctx, cancel := context.WithTimeout(ctx, helloBeats*h.cfg.Heartbeat)
	defer cancel()
	first := appendFrame(nil, frameHello, h.hello.append(nil))
	if s.dialled {
		stream, err := s.conn.NewStream(ctx)
		if err != nil {
			return nil, fmt.Errorf("opening a stream: %w", err)
		}
		if err := stream.SetProtocol(messageProtocol); err != nil {
			return nil, fmt.Errorf("opening a stream: %w", err)
		}
		s.stream = stream
		first = append(openerHead(messageProtocol), first...)
	} else {
		select {
		case s.stream = <-s.inbound:
		case <-s.done:
			return nil, errClosed
		case <-ctx.Done():
			return nil, errors.New("it opened no stream for messages")
		}
	}
	if err := s.stream.SetDeadline(time.Now().Add(helloBeats * h.cfg.Heartbeat)); err != nil {
		return nil, fmt.Errorf("greeting: %w", err)
	}
	if _, err := s.stream.Write(first); err != nil {
		return nil, fmt.Errorf("greeting: %w", err)
	}
	r := bufio.NewReaderSize(s.stream, 16<<10)
	if s.dialled {
		if err := readHead(r, messageProtocol); err != nil {
			return nil, err
		}
	}
	kind, payload, _, err := readFrame(r, h.cfg.Limits.MessageSize, nil)
	if err != nil {
		return nil, fmt.Errorf("it did not greet: %w", err)
	}
	theirs, err := decodeHello(payload)
	if err != nil || kind != frameHello {
		return nil, errProtocol{fmt.Errorf("a frame of kind %d and %d bytes instead of a hello", kind, len(payload))}
	}
	if theirs.job != h.hello.job {
		const why = "it works on another job"
		h.reportRefused(s.member.id, s.conn.RemoteMultiaddr(), why)
		return nil, errors.New(why)
	}
	if err := s.stream.SetDeadline(time.Time{}); err != nil {
		return nil, fmt.Errorf("greeting: %w", err)
	}
	s.heard.Store(int64(h.now()))
	if err := h.events.waitRoom(s.done); err != nil {
		return nil, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if s.dropped || h.closed {
		return nil, errClosed
	}
	if h.crowdedLocked(s) {
		h.counts.crowded.Add(1)
		return nil, errors.New("too many that are no neighbours are connected")
	}
	h.upLocked(s, theirs.run)
	return r, nil
}

// upLocked makes a session one that messages go over.
func (h *Host) upLocked(s *session, run uint64) {
	m := s.member
	s.up, s.upAt, s.run = true, h.now(), run
	for i := len(m.sessions) - 1; i >= 0; i-- {
		if o := m.sessions[i]; o.run != run {
			h.dropLocked(o, "it was started again")
			copy(m.replaced[1:], m.replaced[:])
			m.replaced[0] = o.run
		}
	}
	if slices.Contains(m.replaced[:], run) { // a process has one run: what gave way came back
		h.reportRefused(m.id, s.conn.RemoteMultiaddr(), "two processes use its key, and each takes the other's place: stop one of them, and give a copied machine an identity of its own")
	}
	if other := m.session(); other != nil {
		h.settleLocked(s, other)
	} else {
		m.sessions = append(m.sessions, s)
		h.noticeLocked(m, "")
		close(m.up)
		m.up = make(chan struct{})
		m.poke()
	}
	h.wg.Go(func() { h.write(s) })
	h.linksChanged()
	h.offerLocked(s, 0)
	s.offered = s.upAt
}

// settleLocked chooses between two connections to one member. Both sides keep
// the one that the smaller identity dialled. The other is closed once a
// heartbeat came over the first one, which shows that it is up on both sides.
func (h *Host) settleLocked(s, other *session) {
	m := s.member
	keep, drop := s, other
	if s.dialled == other.dialled {
		if !s.dialled {
			// Only the side that dialled twice decides, else each might close
			// another one.
			m.sessions = append(m.sessions, s)
			return
		}
	} else if s.dialled != (h.self.id < m.id) {
		keep, drop = other, s
	}
	drop.surplus = true
	if keep == s {
		m.sessions = append([]*session{s}, m.sessions...)
	} else {
		m.sessions = append(m.sessions, s)
	}
}

// read handles frames until the session ends, and says why.
func (h *Host) read(s *session, r io.Reader) error {
	var (
		scratch []byte
		haves   []have
		wants   [][32]byte
	)
	for {
		kind, payload, next, err := readFrame(r, h.cfg.Limits.MessageSize, scratch)
		scratch = next
		if err != nil {
			return readError(err)
		}
		s.heard.Store(int64(h.now()))
		s.member.in.Add(uint64(frameHeader + len(payload)))
		if kind == frameHeartbeat || kind == frameAges {
			h.counts.heartbeatIn.Add(uint64(frameHeader + len(payload)))
		} else {
			h.counts.messageIn.Add(uint64(frameHeader + len(payload)))
		}
		if kind != frameMessage {
			h.pace(s, 1+float64(len(payload))/1024)
		}
		switch kind {
		case frameMessage:
			h.counts.messagesIn.Add(1)
			if h.events.full() {
				s.waiting.Store(true)
				err = h.events.waitRoom(s.done)
				s.heard.Store(int64(h.now()))
				s.waiting.Store(false)
			}
			if err == nil && !h.receive(s, payload, 0) {
				h.pace(s, 1)
			}
		case frameHeartbeat:
			h.heartbeat(s, payload)
		case frameAges:
			h.ages(payload)
		case frameRelay:
			var relay bool
			if relay, err = decodeRelay(payload); err == nil {
				h.mu.Lock()
				s.mute = !relay
				h.mu.Unlock()
			}
		case frameHave:
			if haves, err = decodeHave(haves[:0], payload); err == nil {
				h.lacking(s, haves)
			}
		case frameWant:
			if wants, err = decodeWant(wants[:0], payload); err == nil {
				h.answer(s, wants)
			}
		case frameAgain:
			h.offerAgain(s)
		case frameBye:
			return errors.New("it stopped")
		default:
			err = fmt.Errorf("a second hello")
		}
		if err != nil {
			return errProtocol{err}
		}
	}
}

func readError(err error) error {
	switch {
	case errors.Is(err, errOversize) || errors.As(err, new(errKind)):
		return errProtocol{err}
	case errors.Is(err, io.EOF):
		return errors.New("it closed the connection")
	}
	return fmt.Errorf("the connection was lost: %w", err)
}

// enqueueLocked adds a frame to what goes to a session. A member that lets
// them pile up is disconnected.
func (h *Host) enqueueLocked(s *session, f outFrame) {
	if s.dropped {
		return
	}
	if len(s.queue) >= h.cfg.Limits.Queue {
		h.counts.slow.Add(1)
		h.dropLocked(s, fmt.Sprintf("it reads too slowly: %d frames wait for it", len(s.queue)))
		return
	}
	s.queue = append(s.queue, f)
	s.poke()
}

func (s *session) poke() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// write sends what is queued, then what was asked for.
func (h *Host) write(s *session) {
	var (
		queue  []outFrame
		wanted []*keptMessage
		buf    []byte
	)
	flush := func(least int) error {
		if len(buf) <= least {
			return nil
		}
		if err := s.stream.SetWriteDeadline(time.Now().Add(writeTime)); err != nil {
			return err
		}
		_, err := s.stream.Write(buf)
		buf = buf[:0]
		return err
	}
	for {
		h.mu.Lock()
		if s.dropped {
			h.mu.Unlock()
			return
		}
		queue, s.queue = s.queue, queue[:0]
		wanted = wanted[:0]
		if len(queue) == 0 && len(s.wanted) > 0 {
			n := min(len(s.wanted), 32) // a few, so that what is new goes first
			wanted = append(wanted, s.wanted[:n]...)
			s.wanted = append(s.wanted[:0], s.wanted[n:]...)
		}
		h.mu.Unlock()
		if len(queue) == 0 && len(wanted) == 0 {
			select {
			case <-s.wake:
				continue
			case <-s.done:
				return
			}
		}
		for _, k := range wanted {
			queue = append(queue, outFrame{kind: frameMessage, data: k.data})
		}
		var err error
		for i, f := range queue {
			s.member.out.Add(uint64(frameHeader + len(f.data)))
			switch f.kind {
			case frameHeartbeat, frameAges:
				h.counts.heartbeatOut.Add(uint64(frameHeader + len(f.data)))
			case frameMessage:
				h.counts.messagesOut.Add(1)
				fallthrough
			default:
				h.counts.messageOut.Add(uint64(frameHeader + len(f.data)))
			}
			buf = appendFrame(buf, f.kind, f.data)
			queue[i].data = nil
			if err = flush(batchSize); err != nil {
				break
			}
		}
		if err == nil {
			err = flush(0)
		}
		if err != nil {
			h.mu.Lock()
			h.dropLocked(s, fmt.Sprintf("the connection was lost: %v", err))
			h.mu.Unlock()
			return
		}
	}
}

// linksChanged makes beat tell all members soon.
func (h *Host) linksChanged() {
	select {
	case h.links <- struct{}{}:
	default:
	}
}

// beat sends heartbeats and looks for those that others miss. When members
// come or go it sends one at once, but not one for each of many: n members that
// start together would send n cubed.
func (h *Host) beat() {
	interval := h.cfg.Heartbeat
	tick := time.NewTicker(interval)
	defer tick.Stop()
	soon, late := time.NewTimer(interval), time.NewTicker(max(time.Millisecond, interval/lateParts))
	defer soon.Stop()
	defer late.Stop()
	last, sent := h.now(), time.Duration(0)
	for {
		select {
		case <-tick.C:
		case <-h.links:
			soon.Reset(max(0, sent+interval/16-h.now()))
			continue
		case <-late.C:
			h.offerLate()
			continue
		case <-soon.C:
			sent = h.now()
			h.mu.Lock()
			h.beatLocked()
			h.mu.Unlock()
			continue
		case <-h.stop:
			return
		}
		now := h.now()
		sent = now
		// Where this process itself was stopped, what members sent meanwhile
		// still waits to be read.
		stopped := now-last > 3*interval
		last = now
		h.mu.Lock()
		for _, s := range h.sessions {
			if stopped || s.waiting.Load() {
				s.heard.Store(int64(now))
			}
			if !s.up {
				continue // greet has its own time limit
			}
			if silent := now - time.Duration(s.heard.Load()); silent > missedHeartbeats*interval {
				h.counts.silent.Add(1)
				h.dropLocked(s, fmt.Sprintf("no heartbeat for %v", silent.Round(time.Millisecond)))
				continue
			}
			if first := s.member.session(); s.surplus && first != s && first.peers != nil {
				h.dropLocked(s, "there is another connection to it")
				continue
			}
			h.offerAllLocked(s)
			h.offerLocked(s, interval)
			if s.lost && len(s.held) == 0 {
				s.lost = false // what was held could be judged: so can what was lost
				h.enqueueLocked(s, outFrame{kind: frameAgain})
			}
			if len(s.held) > 0 {
				h.judgeLater()
			}
		}
		h.watchLocked()
		h.beatLocked()
		h.mu.Unlock()
	}
}

// beatLocked tells all members whom this peer is connected to.
func (h *Host) beatLocked() {
	if h.closed {
		return
	}
	var ages []byte
	if h.sparse {
		ages = h.agesLocked()
	}
	mine := newBitset(h.roster.highest)
	mine.set(h.self.index)
	for _, m := range h.roster.members {
		if m.session() != nil {
			mine.set(m.index)
		}
	}
	for _, s := range h.sessions {
		if s.up {
			h.enqueueLocked(s, outFrame{kind: frameHeartbeat, data: mine})
			if h.sparse {
				h.enqueueLocked(s, outFrame{kind: frameAges, data: ages})
			}
		}
	}
}

// handleStream takes a stream that a member opened.
func (h *Host) handleStream(ctx context.Context, stream network.Stream) {
	if !h.spawn(func() { h.accept(ctx, stream) }) {
		stream.Reset()
	}
}

func (h *Host) accept(ctx context.Context, stream network.Stream) {
	c := stream.Conn()
	h.mu.Lock()
	s, g := h.sessions[c], h.guests[c]
	h.mu.Unlock()
	if s == nil {
		if g == nil {
			stream.Reset()
			return
		}
		h.attend(ctx, g, stream)
		return
	}
	if err := stream.SetDeadline(time.Now().Add(helloBeats * h.cfg.Heartbeat)); err != nil {
		stream.Reset()
		return
	}
	protocols := []string{messageProtocol, bodyProtocol}
	if h.cfg.Guests != nil {
		protocols = append(protocols, joinProtocol)
	}
	protocol, err := acceptHead(stream, protocols...)
	if err == nil {
		err = stream.SetProtocol(protocolID(protocol))
	}
	switch {
	case err != nil:
	case protocol == bodyProtocol:
		h.serve(s, stream)
		return
	case protocol == joinProtocol:
		h.attendMember(ctx, stream)
		return
	case !s.dialled:
		select {
		case s.inbound <- stream:
			return
		default: // a second one
		}
	}
	stream.Reset()
}
