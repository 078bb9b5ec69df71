package p2p

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/connmgr"
	"github.com/libp2p/go-libp2p/core/control"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/peerstore"
	ma "github.com/multiformats/go-multiaddr"

	"github.com/spirt-ml/spirt/internal/treehash"
)

// rawPeer holds a member's key and speaks whatever a test wants it to.
type rawPeer struct {
	*fabric
	t      testing.TB
	conn   network.Conn
	stream network.Stream
	r      *bufio.Reader
}

type openGate struct{ connmgr.ConnectionGater }

func (openGate) InterceptPeerDial(peer.ID) bool               { return true }
func (openGate) InterceptAddrDial(peer.ID, ma.Multiaddr) bool { return true }
func (openGate) InterceptAccept(network.ConnMultiaddrs) bool  { return true }
func (openGate) InterceptSecured(network.Direction, peer.ID, network.ConnMultiaddrs) bool {
	return true
}
func (openGate) InterceptUpgraded(network.Conn) (bool, control.DisconnectReason) { return true, 0 }

// dialRaw connects as member i to p, and does nothing more.
func (g *group) dialRaw(i int, p *testPeer) *rawPeer {
	g.t.Helper()
	limits, _ := Limits{}.withDefaults(4)
	f, err := newFabric(g.keys[i], 4, limits, openGate{})
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() { f.close() })
	r := &rawPeer{fabric: f, t: g.t}
	r.dial(p)
	return r
}

func (r *rawPeer) dial(p *testPeer) error {
	id := p.self.id
	addr, _, err := parseAddress(p.Addrs()[0])
	if err != nil {
		r.t.Fatal(err)
	}
	r.swarm.Peerstore().AddAddr(id, addr, peerstore.PermanentAddrTTL)
	r.swarm.Backoff().Clear(id)
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	r.conn, err = r.swarm.DialPeer(ctx, id)
	return err
}

// greet opens the message stream and exchanges hellos.
func (r *rawPeer) greet(p *testPeer) {
	r.t.Helper()
	r.greetAs(p, 1)
}

// greetAs greets as one of its runs.
func (r *rawPeer) greetAs(p *testPeer, run uint64) {
	r.t.Helper()
	theirs := p.hello
	theirs.run += run
	r.send(appendFrame(openerHead(messageProtocol), frameHello, theirs.append(nil)))
	r.r = bufio.NewReader(r.stream)
	if err := readHead(r.r, messageProtocol); err != nil {
		r.t.Fatal(err)
	}
	if kind, _ := r.next(); kind != frameHello {
		r.t.Fatalf("a frame of kind %d instead of a hello", kind)
	}
}

func (r *rawPeer) send(b []byte) {
	r.t.Helper()
	if r.stream == nil {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		s, err := r.conn.NewStream(ctx)
		if err != nil {
			r.t.Fatal(err)
		}
		r.stream = s
	}
	r.stream.SetDeadline(time.Now().Add(patience))
	if _, err := r.stream.Write(b); err != nil {
		r.t.Logf("writing: %v", err) // the other side may hang up at any time
	}
}

func (r *rawPeer) next() (byte, []byte) {
	r.t.Helper()
	kind, payload, _, err := readFrame(r.r, 64<<10, nil)
	if err != nil {
		r.t.Fatal(err)
	}
	return kind, payload
}

// hungUp waits until the other side ends the connection.
func (r *rawPeer) hungUp() {
	r.t.Helper()
	late := time.After(patience)
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !r.conn.IsClosed() {
		select {
		case <-tick.C:
		case <-late:
			r.t.Fatal("it keeps the connection")
		}
	}
}

func TestWhatNoPeerSendsEndsTheConnection(t *testing.T) {
	frame := func(kind byte, n int) []byte { return appendFrame(nil, kind, make([]byte, n)) }
	huge := binary.LittleEndian.AppendUint32(nil, 1<<31)
	badHave := make([]byte, haveEntry)
	badHave[42] = 2
	for _, c := range []struct {
		name   string
		bytes  []byte
		reason string
		over   bool
	}{
		{"oversize message", append(huge, frameMessage), "a frame over its bound: kind 2, 2147483648 bytes, at most 65536", true},
		{"one byte too much", frame(frameMessage, 64<<10+1), "a frame over its bound: kind 2, 65537 bytes", true},
		{"oversize heartbeat", frame(frameHeartbeat, 8193), "a frame over its bound: kind 3, 8193 bytes, at most 8192", true},
		{"unknown kind", frame(99, 0), "a frame of unknown kind 99", false},
		{"second hello", frame(frameHello, helloSize), "a second hello", false},
		{"half a have-list", frame(frameHave, haveEntry-1), "a have-list of 42 bytes", false},
		{"have-list of a strange kind", appendFrame(nil, frameHave, badHave), "a have-list with a flag of 2", false},
		{"relay of another kind", appendFrame(nil, frameRelay, []byte{2}), "a relay frame of 02", false},
		{"empty relay", frame(frameRelay, 0), "a relay frame of ", false},
		{"oversize again", frame(frameAgain, 1), "a frame over its bound: kind 7, 1 bytes, at most 0", true},
		{"half a want-list", frame(frameWant, 31), "a want-list of 31 bytes", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := newGroup(t, 2)
			p := g.start(0)
			r := g.dialRaw(1, p)
			r.greet(p)
			p.wait("connected", func() bool { return p.connected[1] })
			r.send(c.bytes)
			p.wait("disconnected", func() bool { return len(p.reasons[1]) == 1 })
			if got := p.reasons[1][0]; !strings.Contains(got, c.reason) {
				t.Errorf("reason %q, want %q", got, c.reason)
			}
			r.hungUp()
			if err := r.dial(p); err == nil {
				r.hungUp() // refused after the handshake
			}
			p.wait("refused", func() bool { return len(p.refused) > 0 })
			if e := p.refused[0]; e.Remote != PeerID(r.swarm.LocalPeer().String()) || !strings.Contains(e.Address, "127.0.0.1") || !strings.Contains(e.Reason, c.reason) {
				t.Errorf("refused: %+v", e)
			}
			s := p.Stats()
			if got := [2]uint64{s.Oversize, s.Malformed}; c.over && got != [2]uint64{1, 0} || !c.over && got != [2]uint64{0, 1} {
				t.Errorf("oversize and malformed: %v", got)
			}
		})
	}
}

func TestNoHelloEndsTheConnection(t *testing.T) {
	g := newGroup(t, 2)
	p := g.start(0, func(c *Config) { c.Heartbeat = 20 * time.Millisecond }) // 400 ms for a hello
	other := hello{job: [32]byte{2}}.append(nil)
	for _, c := range []struct {
		name, refused string
		bytes         []byte
	}{
		{"other job", "it works on another job", appendFrame(openerHead(messageProtocol), frameHello, other)},
		{"no stream", "", nil},
		{"silent stream", "", openerHead(messageProtocol)},
		{"unknown protocol", "", openerHead("/spirt/message/0")},
		{"no multistream", "", make([]byte, 100)},
	} {
		t.Run(c.name, func(t *testing.T) {
			p.wait("room", func() bool { p.refused = nil; return true })
			r := g.dialRaw(1, p)
			if c.bytes != nil {
				r.send(c.bytes)
			}
			r.hungUp()
			if c.refused != "" {
				p.wait("refused", func() bool { return len(p.refused) == 1 && p.refused[0].Reason == c.refused })
			}
			p.wait("never connected", func() bool { return len(p.connected) == 0 && len(p.reasons) == 0 })
		})
	}
}

func TestSilentMemberIsDisconnected(t *testing.T) {
	g := newGroup(t, 2)
	g.beat = testHeartbeat
	p := g.start(0)
	r := g.dialRaw(1, p)
	r.greet(p)
	p.wait("connected", func() bool { return p.connected[1] })
	begin := time.Now()
	p.wait("disconnected", func() bool { return len(p.reasons[1]) == 1 })
	if took := time.Since(begin); took < missedHeartbeats*testHeartbeat/2 {
		t.Errorf("after %v: too early", took)
	}
	if got := p.reasons[1][0]; !strings.HasPrefix(got, "no heartbeat for ") {
		t.Errorf("reason %q", got)
	}
	r.hungUp()
	if s := p.Stats(); s.Silent != 1 {
		t.Errorf("silent: %d", s.Silent)
	}
}

func TestLostConnectionIsNoticedAtOnce(t *testing.T) {
	g := newGroup(t, 2)
	p := g.start(0, func(c *Config) { c.Heartbeat = time.Minute })
	r := g.dialRaw(1, p)
	r.greet(p)
	p.wait("connected", func() bool { return p.connected[1] })
	r.conn.Close() // as the kernel does for a killed process
	p.wait("disconnected", func() bool { return len(p.reasons[1]) == 1 })
	if got := p.reasons[1][0]; !strings.Contains(got, "connection") {
		t.Errorf("reason %q", got)
	}
}

func TestBadMessagesEndTheConnection(t *testing.T) {
	g := newGroup(t, 2)
	p := g.start(0)
	r := g.dialRaw(1, p)
	r.greet(p)
	forged, _ := seal(g.keys[1], 0, 1, "forged") // by 1 in the name of 0
	good, _ := seal(g.keys[1], 1, 1, "good")
	for range 7 {
		r.send(appendFrame(nil, frameMessage, forged))
	}
	r.send(appendFrame(nil, frameMessage, good))
	p.hears("good")
	r.send(appendFrame(nil, frameMessage, forged))
	p.wait("disconnected", func() bool { return len(p.reasons[1]) == 1 })
	if got := p.reasons[1][0]; !strings.Contains(got, "8 times") || !strings.Contains(got, "the signature does not hold") {
		t.Errorf("reason %q", got)
	}
	if s := p.Stats(); s.Bad != 8 || s.Banned != 1 || s.Delivered != 1 {
		t.Errorf("stats %+v", s)
	}
	if _, ok := p.texts["forged"]; ok {
		t.Error("a forged message was handed over")
	}
}

func TestPenaltyEnds(t *testing.T) {
	g := newGroup(t, 2)
	g.limits.Penalty = time.Millisecond
	p := g.start(0)
	r := g.dialRaw(1, p)
	r.greet(p)
	r.send(appendFrame(nil, 99, nil))
	p.wait("disconnected", func() bool { return len(p.reasons[1]) == 1 })
	r.hungUp()
	o := g.start(1)
	o.dials(p)
	p.wait("connected again", func() bool { return p.connected[1] })
}

func TestSlowReaderIsDisconnected(t *testing.T) {
	g := newGroup(t, 2)
	g.limits.Queue = 16
	p := g.start(0)
	r := g.dialRaw(1, p)
	r.greet(p) // and reads nothing more
	p.wait("connected", func() bool { return p.connected[1] })
	stop, beats := make(chan struct{}), sync.WaitGroup{}
	beats.Go(func() { // it is alive, though
		tick := time.NewTicker(testHeartbeat)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				r.stream.Write(appendFrame(nil, frameHeartbeat, []byte{3}))
			case <-stop:
				return
			}
		}
	})
	for slot := uint64(0); p.Stats().Slow == 0; slot++ {
		p.says(slot, strings.Repeat("x", 60<<10))
		if slot > 10_000 {
			t.Fatal("everything is buffered")
		}
	}
	p.wait("disconnected", func() bool { return len(p.reasons[1]) == 1 })
	if got := p.reasons[1][0]; !strings.HasPrefix(got, "it reads too slowly") {
		t.Errorf("reason %q", got)
	}
	close(stop)
	beats.Wait()
}

// TestAskingIsBounded asks for one message many times; it comes once.
func TestAskingIsBounded(t *testing.T) {
	g := newGroup(t, 2)
	g.beat = testHeartbeat
	p := g.start(0)
	data, meta := seal(g.keys[0], 0, 5, "precious")
	if err := p.Broadcast(data, meta); err != nil {
		t.Fatal(err)
	}
	r := g.dialRaw(1, p)
	r.greet(p)
	for {
		kind, payload := r.next()
		if kind != frameHave {
			continue
		}
		list, err := decodeHave(nil, payload)
		if err != nil || len(list) != 1 || list[0] != (have{meta.ID, 0, 5, false}) {
			t.Fatalf("have-list %v, %v", list, err)
		}
		break
	}
	for range 5 {
		r.send(appendFrame(nil, frameWant, meta.ID[:]))
	}
	for messages, beats := 0, 0; beats < 3; {
		switch kind, payload := r.next(); kind {
		case frameMessage:
			if messages++; messages > 1 || string(payload) != string(data) {
				t.Fatalf("message %d: %q", messages, payload)
			}
		case frameHeartbeat:
			r.send(appendFrame(nil, frameHeartbeat, []byte{3}))
			beats += messages // three of them after the message
		}
	}
}

// lyingPeer answers body requests as a test says. It stays connected.
func (g *group) lyingPeer(i int, p *testPeer, answer func(network.Stream, request)) *rawPeer {
	r := g.dialRaw(i, p)
	r.swarm.SetStreamHandler(func(s network.Stream) {
		s.SetDeadline(time.Now().Add(patience))
		if _, err := acceptHead(s, bodyProtocol); err != nil {
			return
		}
		for {
			var buf [requestSize]byte
			if _, err := io.ReadFull(s, buf[:]); err != nil {
				return
			}
			q, err := decodeRequest(buf[:], 1<<30)
			if err != nil {
				g.t.Error(err)
			}
			answer(s, q)
		}
	})
	r.greet(p)
	stop := make(chan struct{})
	var beats sync.WaitGroup
	beats.Go(func() {
		tick := time.NewTicker(testHeartbeat)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				r.stream.Write(appendFrame(nil, frameHeartbeat, []byte{7}))
			case <-stop:
				return
			}
		}
	})
	g.t.Cleanup(func() { close(stop); beats.Wait() })
	p.wait("the liar is connected", func() bool { return p.connected[i] })
	return r
}

// honest answers a request as it should be.
func honest(s network.Stream, q request, body []byte) {
	answer := []byte{statusOK}
	switch q.kind {
	case wantManifest:
		for _, l := range treehash.Leaves(body) {
			answer = append(answer, l[:]...)
		}
	case wantHoldings:
		all := newBitset(q.chunks() - 1)
		for i := range q.chunks() {
			all.set(i)
		}
		answer = append(answer, all...)
	default:
		answer = append(answer, chunkOf(body, q.n)...)
	}
	s.Write(answer)
}

func (r request) chunks() int { return treehash.NumChunks(r.size) }

func TestFetchFallsOverToAnHonestMember(t *testing.T) {
	for _, c := range []struct {
		name   string
		answer func(s network.Stream, q request, body []byte)
		lies   bool
	}{
		{"wrong chunk", func(s network.Stream, q request, body []byte) {
			if q.kind == wantChunk {
				body = append([]byte{}, body...)
				for i := range body {
					body[i] ^= 1
				}
			}
			honest(s, q, body)
		}, true},
		{"chunks in another order", func(s network.Stream, q request, body []byte) {
			if q.kind == wantChunk {
				body = append(append([]byte{}, body[len(body)/2:]...), body[:len(body)/2]...)
			}
			honest(s, q, body)
		}, true},
		{"packed and not asked for", func(s network.Stream, q request, body []byte) {
			if q.kind == wantChunk {
				s.Write([]byte{statusPacked, 1, 0, 0, 0, 0})
				return
			}
			honest(s, q, body)
		}, true},
		{"wrong manifest", func(s network.Stream, q request, body []byte) {
			body = append([]byte{}, body...)
			body[0] ^= 1
			honest(s, q, body)
		}, true},
		{"holdings beyond the last chunk", func(s network.Stream, q request, body []byte) {
			if q.kind == wantHoldings {
				s.Write(append([]byte{statusOK}, bytes.Repeat([]byte{255}, bitsetSize(q.chunks()-1))...))
				return
			}
			honest(s, q, body)
		}, true},
		{"claims what it does not have", func(s network.Stream, q request, body []byte) {
			if q.kind == wantChunk {
				s.Write([]byte{statusAbsent})
				return
			}
			honest(s, q, body)
		}, false},
		{"too short", func(s network.Stream, q request, body []byte) {
			if q.kind != wantChunk {
				honest(s, q, body)
				return
			}
			c := chunkOf(body, q.n)
			s.Write(append([]byte{statusOK}, c[:len(c)/2]...))
			s.Close()
		}, false},
		{"too long", func(s network.Stream, q request, body []byte) {
			honest(s, q, body)
			s.Write(body)
		}, false},
		{"unknown status", func(s network.Stream, q request, _ []byte) { s.Write([]byte{77}) }, true},
		{"does not have it", func(s network.Stream, q request, _ []byte) { s.Write([]byte{statusAbsent}) }, false},
		{"busy", func(s network.Stream, q request, _ []byte) { s.Write([]byte{statusBusy}) }, false},
		{"hangs", func(network.Stream, request, []byte) {}, false},
		{"hangs after the manifest", func(s network.Stream, q request, body []byte) {
			if q.kind == wantManifest {
				honest(s, q, body)
			}
		}, false},
		{"hangs up", func(s network.Stream, q request, body []byte) { s.Reset() }, false},
	} {
		for _, size := range []int{1000, 20*treehash.ChunkSize + 5} {
			if size == 1000 && (strings.Contains(c.name, "manifest") || strings.Contains(c.name, "holdings")) {
				continue
			}
			t.Run(c.name, func(t *testing.T) {
				t.Parallel()
				g := newGroup(t, 3)
				p, h := g.start(0), g.start(1)
				p.dials(h)
				p.wait("connected", func() bool { return p.connected[1] })
				body := randomBody(size)
				hash := h.shelf.put(body)
				g.lyingPeer(2, p, func(s network.Stream, q request) { c.answer(s, q, body) })
				if c.lies { // alone, since from both it may be done before the lie came
					if _, err := p.Fetch(context.Background(), hash, int64(len(body)), []int{2}); err == nil {
						t.Error("fetched from a liar")
					}
				}
				mustFetch(t, p, hash, body, 2, 1)
				if s := p.Stats(); c.lies && s.BadBodies == 0 {
					t.Error("the lie was not counted")
				} else if !c.lies && c.name != "too long" && s.BadBodies != 0 {
					t.Error("counted as a lie")
				}
			})
		}
	}
}

func TestFetchFromLiarsOnlyFails(t *testing.T) {
	g := newGroup(t, 3)
	p := g.start(0)
	body := randomBody(1000)
	g.lyingPeer(2, p, func(s network.Stream, q request) { s.Write(append([]byte{statusOK}, make([]byte, 1000)...)) })
	_, err := p.Fetch(context.Background(), treehash.Sum(body), 1000, []int{2})
	if !errors.Is(err, errLie) && (err == nil || !strings.Contains(err.Error(), "member 2: chunk 0: what it sent does not have the hash")) {
		t.Errorf("error %v", err)
	}
	// A body that nobody has: until the context ends, and then says who said what.
	ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
	defer cancel()
	_, err = p.Fetch(ctx, treehash.Sum(body[1:]), 999, []int{1})
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "member 1: it is not connected") {
		t.Errorf("error %v", err)
	}
}

// A key in two places is told apart from a process that is started again.
func TestTwoProcessesOfOneKeyAreTold(t *testing.T) {
	g := newGroup(t, 2)
	p := g.start(0)
	for i, run := range []uint64{1, 2, 3, 2} {
		r := g.dialRaw(1, p)
		r.greetAs(p, run)
		p.wait("the run", func() bool {
			p.Host.mu.Lock()
			defer p.Host.mu.Unlock()
			s := p.roster.members[1].session()
			return s != nil && s.run == p.hello.run+run
		})
		told := func() bool {
			return len(p.refused) == 1 && strings.Contains(p.refused[0].Reason, "two processes use its key")
		}
		if i == 3 {
			p.wait("the copy is told", told)
		} else if p.look(func() {
			if len(p.refused) > 0 {
				t.Errorf("run %d: %+v", run, p.refused)
			}
		}); t.Failed() {
			return
		}
	}
}

func TestMalformedBodyRequestsAreRefused(t *testing.T) {
	g := newGroup(t, 2)
	p := g.start(0)
	body := randomBody(3 * treehash.ChunkSize)
	hash := p.shelf.put(body)
	r := g.dialRaw(1, p)
	r.greet(p)
	for i, q := range []request{
		{hash, 0, wantManifest, 0},
		{hash, 1 << 40, wantManifest, 0},
		{hash, int64(len(body)), wantManifest, 1},
		{hash, int64(len(body)), wantChunk, 3},
		{hash, int64(len(body)), wantPacked, 3},
		{hash, int64(len(body)), wantHoldings, 4},
		{hash, int64(len(body)), 9, 0},
	} {
		s, err := r.conn.NewStream(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		s.SetDeadline(time.Now().Add(patience))
		if _, err := s.Write(q.append(openerHead(bodyProtocol))); err != nil {
			t.Fatal(err)
		}
		if err := readHead(s, bodyProtocol); err != nil {
			t.Fatal(err)
		}
		var b [1]byte
		if _, err := io.ReadFull(s, b[:]); err != nil || b[0] != statusRefused {
			t.Errorf("request %d: status %d, %v", i, b[0], err)
		}
		if _, err := s.Read(b[:]); err == nil {
			t.Errorf("request %d: the stream goes on", i)
		}
	}
	poll(t, "seven malformed requests are counted", func() bool { return p.Stats().Malformed == 7 })
	if p.shelf.asked != 0 {
		t.Errorf("asked %d", p.shelf.asked)
	}
	// A body of another size than the one here is not here.
	s, err := r.conn.NewStream(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	s.SetDeadline(time.Now().Add(patience))
	s.Write(request{hash, int64(len(body)) + 1, wantChunk, 0}.append(openerHead(bodyProtocol)))
	if err := readHead(s, bodyProtocol); err != nil {
		t.Fatal(err)
	}
	var b [1]byte
	if _, err := io.ReadFull(s, b[:]); err != nil || b[0] != statusAbsent {
		t.Errorf("status %d, %v", b[0], err)
	}
}
