package p2p

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	ma "github.com/multiformats/go-multiaddr"

	"github.com/spirt-ml/spirt/internal/treehash"
)

// all returns the indices of a group's members, the first one given first and
// one left out, as those name sources who do not know who has what.
func (g *group) all(first, without int) []int {
	out := []int{first}
	for i := range g.peers {
		if i != first && i != without {
			out = append(out, i)
		}
	}
	return out
}

// TestPopularBody counts what the owner of a body uploads when all others
// fetch it at once.
func TestPopularBody(t *testing.T) {
	g := newGroup(t, 8)
	g.startAll()
	body := randomBody(16 << 20)
	hash := g.peers[0].shelf.put(body)
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	errs := make(chan error, 7)
	for i, p := range g.peers[1:] {
		go func() {
			got, err := p.Fetch(ctx, hash, int64(len(body)), g.all(0, i+1))
			if err == nil && !bytes.Equal(got, body) {
				err = errors.New("the body is another one")
			}
			if err == nil {
				p.shelf.put(got) // as peers do
			}
			errs <- err
		}()
	}
	for range 7 {
		if err := <-errs; err != nil {
			t.Fatal(err)
		}
	}
	var in, out, traded uint64
	for _, p := range g.peers {
		s := p.Stats()
		in, out, traded = in+s.BodyBytesIn, out+s.BodyBytesOut, traded+s.BodyTraded
		if s.BadBodies != 0 || s.Malformed != 0 || s.Banned != 0 {
			t.Errorf("peer %d: %+v", p.index, s)
		}
	}
	copies := float64(g.peers[0].Stats().BodyBytesOut) / float64(len(body))
	t.Logf("the owner uploaded %.2f copies; 7 copies are %d bytes, sent %d, received %d; %d chunks of unfinished bodies",
		copies, 7*len(body), out, in, traded)
	if copies > 2.5 {
		t.Errorf("the owner uploaded %.2f copies", copies)
	}
	if traded == 0 {
		t.Error("nobody served what it was fetching")
	}
	if in > uint64(7*len(body))*21/20 {
		t.Errorf("%d bytes received: chunks came twice", in)
	}
}

// rightChunks returns how many chunks of b are those of body.
func rightChunks(b, body []byte) (n int) {
	for i, l := range treehash.Leaves(body) {
		if treehash.Leaf(i, chunkOf(b, i)) == l {
			n++
		}
	}
	return n
}

// TestUnfinishedBodyIsServed lets a peer have a few chunks of a body, and no
// more to come by; another gets these from it.
func TestUnfinishedBodyIsServed(t *testing.T) {
	g := newGroup(t, 3)
	p, o := g.start(0), g.start(1)
	p.dials(o)
	p.wait("connected", func() bool { return p.connected[1] })
	body := randomBody(32*treehash.ChunkSize - 7)
	hash := treehash.Sum(body)
	var mu sync.Mutex
	given := 0
	g.lyingPeer(2, p, func(s network.Stream, q request) {
		mu.Lock()
		defer mu.Unlock()
		if q.kind == wantChunk {
			if given++; given > 5 {
				return
			}
		}
		honest(s, q, body)
	})
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	dst := make([]byte, len(body))
	go func() { ended <- p.FetchInto(ctx, dst, hash, []int{2}) }()

	// The other one fetches from the first only, and gets the five.
	part := make([]byte, len(body))
	octx, ocancel := context.WithCancel(context.Background())
	oended := make(chan error, 1)
	go func() { oended <- o.FetchInto(octx, part, hash, []int{0}) }()
	poll(t, "five chunks are traded", func() bool { return p.Stats().BodyTraded == 5 })
	poll(t, "and arrive", func() bool { return o.Stats().BodyBytesIn >= 5*treehash.ChunkSize })
	ocancel()
	cancel()
	if err := <-oended; !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	if a, b := rightChunks(dst, body), rightChunks(part, body); a != 5 || b < 4 { // the fifth may be on its way
		t.Errorf("%d and %d chunks", a, b)
	}
	if _, ok := p.bodies.parts[hash]; ok {
		t.Error("a fetch that ended is still offered")
	}

	// Both go on from there, from someone who has everything.
	full := p.shelf.put(body)
	before := o.Stats().BodyBytesIn
	if err := o.Resume(context.Background(), part, full, []int{0}, time.Minute); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(part, body) {
		t.Error("the body is another one")
	}
	if came := o.Stats().BodyBytesIn - before; came > 28*treehash.ChunkSize+4096 {
		t.Errorf("%d bytes came for 28 chunks: what was there came again", came)
	}
	before = o.Stats().BodyBytesIn
	if err := o.Resume(context.Background(), part, full, []int{0}, time.Minute); err != nil {
		t.Fatal(err)
	}
	if came := o.Stats().BodyBytesIn - before; came > 4096 {
		t.Errorf("%d bytes came for nothing", came)
	}
}

// TestSourcesDieInTheMiddle has three sources of a state that go away after
// some chunks, one after the other, and a fourth that comes back.
func TestSourcesDieInTheMiddle(t *testing.T) {
	g := newGroup(t, 5)
	p := g.start(0)
	body := randomBody(40 * treehash.ChunkSize)
	hash := treehash.Sum(body)
	var given [4]atomic.Int32
	for i := 1; i <= 3; i++ {
		g.lyingPeer(i, p, func(s network.Stream, q request) {
			if q.kind == wantChunk && given[i].Add(1) > 6 {
				s.Reset()
				return
			}
			honest(s, q, body)
		})
	}
	dst := make([]byte, len(body))
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- p.FetchInto(ctx, dst, hash, []int{1, 2, 3}) }()
	poll(t, "all three died", func() bool { return min(given[1].Load(), given[2].Load(), given[3].Load()) > 6 })
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	here := rightChunks(dst, body) // what a connection had in its buffers died with it
	if here < 3 {
		t.Errorf("%d chunks are here", here)
	}
	before := p.Stats().BodyBytesIn
	o := g.start(4)
	o.shelf.put(body)
	p.dials(o)
	p.wait("connected", func() bool { return p.connected[4] })
	if err := p.Resume(context.Background(), dst, hash, []int{1, 2, 3, 4}, time.Minute); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(dst, body) {
		t.Fatal("the body is another one")
	}
	if came := p.Stats().BodyBytesIn - before; came > uint64(40-here)*treehash.ChunkSize+16<<10 {
		t.Errorf("%d bytes came for %d chunks", came, 40-here)
	}
}

// throttle passes bytes between a peer and whoever connects, so many a second
// towards the latter.
type throttle struct {
	net.Listener
	passed atomic.Int64
}

func newThrottle(t testing.TB, to *testPeer, rate int) (*throttle, string) {
	addr, err := ma.NewMultiaddr(strings.Split(to.Addrs()[0], "/p2p/")[0])
	if err != nil {
		t.Fatal(err)
	}
	port, _ := addr.ValueForProtocol(ma.P_TCP)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	h := &throttle{Listener: l}
	var wg sync.WaitGroup
	var mu sync.Mutex
	var conns []net.Conn
	wg.Go(func() {
		for {
			near, err := l.Accept()
			if err != nil {
				return
			}
			far, err := net.Dial("tcp", "127.0.0.1:"+port)
			if err != nil {
				near.Close()
				continue
			}
			far.(*net.TCPConn).SetReadBuffer(32 << 10)
			near.(*net.TCPConn).SetWriteBuffer(32 << 10)
			mu.Lock()
			conns = append(conns, near, far)
			mu.Unlock()
			wg.Go(func() { io.Copy(far, near); far.Close() })
			wg.Go(func() {
				const step = 8 << 10
				pace := time.NewTicker(time.Second * step / time.Duration(rate))
				defer pace.Stop()
				for {
					<-pace.C
					n, err := io.CopyN(near, far, step)
					h.passed.Add(n)
					if err != nil {
						near.Close()
						return
					}
				}
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		mu.Lock()
		for _, c := range conns {
			c.Close()
		}
		mu.Unlock()
		wg.Wait()
	})
	return h, l.Addr().String()
}

// TestMessageDoesNotWaitForABody counts what gets over a slow connection
// before a message that is sent while a body is fetched.
func TestMessageDoesNotWaitForABody(t *testing.T) {
	g := newGroup(t, 2)
	o, p := g.start(0), g.start(1)
	slow, addr := newThrottle(t, o, 4<<20)
	if err := p.SetAddresses(0, []string{addr}); err != nil {
		t.Fatal(err)
	}
	p.wait("connected", func() bool { return p.connected[0] })
	o.wait("connected", func() bool { return o.connected[1] })
	body := randomBody(24 << 20)
	hash := o.shelf.put(body)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() {
		_, err := p.Fetch(ctx, hash, int64(len(body)), []int{0})
		ended <- err
	}()
	poll(t, "the body is on its way", func() bool { return p.Stats().BodyBytesIn > 2<<20 })
	before := slow.passed.Load()
	o.says(1, "urgent")
	p.hears("urgent")
	if n := slow.passed.Load() - before; n > 2<<20 {
		t.Errorf("%d bytes came before the message", n)
	}
	select {
	case err := <-ended:
		t.Errorf("the body came first: %v", err)
	default:
	}
	cancel()
	<-ended
}

func TestLink(t *testing.T) {
	var l link
	now := time.Unix(0, 0)
	// chunks lets n chunks come, each sent when it is its turn at the given
	// rate, with a round trip before the first.
	var due time.Time
	chunks := func(n int, rtt time.Duration, rate int) {
		var asked []time.Time
		for got := 0; got < n; got++ {
			for l.take() {
				asked = append(asked, now)
				if due.Before(now.Add(rtt)) {
					due = now.Add(rtt)
				}
			}
			start := asked[0].Add(rtt)
			if start.Before(now) {
				start = now
			}
			now = start.Add(treehash.ChunkSize * time.Second / time.Duration(rate))
			l.came(asked[0], now, treehash.ChunkSize)
			asked = asked[1:]
		}
		l.free(len(asked))
	}
	chunks(200, time.Millisecond, 300<<20)
	if l.window != maxWindow {
		t.Errorf("a fast link has %d chunks under way", l.window)
	}
	if l.packs(PackAuto, false) || !l.packs(PackAlways, true) {
		t.Error("packed on a fast link, or not when told to")
	}
	l = link{}
	chunks(200, 200*time.Millisecond, 50<<20)
	if l.window < 25 {
		t.Errorf("a fast link with a long way has %d chunks under way", l.window)
	}
	l = link{}
	chunks(50, 20*time.Millisecond, 1<<20)
	if l.window > 2 {
		t.Errorf("a slow link has %d chunks under way", l.window)
	}
	if !l.packs(PackAuto, false) || l.packs(PackAuto, true) || l.packs(PackNever, false) {
		t.Error("not packed on a slow link, or on this machine, or when told not to")
	}
	chunks(100, time.Millisecond, 300<<20)
	if l.window < 8 || l.packs(PackAuto, false) {
		t.Errorf("a link that became fast has %d chunks under way", l.window)
	}
	if l.out != 0 {
		t.Errorf("%d chunks left under way", l.out)
	}
}

// Who looks for what members may have dropped hears so soon, and does not wait
// for those that say nothing.
func TestResumeGivesUp(t *testing.T) {
	g := newGroup(t, 4)
	p, o := g.start(0), g.start(1)
	p.dials(o)
	p.wait("connected", func() bool { return p.connected[1] })
	for _, size := range []int{1000, 20*treehash.ChunkSize + 5} {
		body := randomBody(size)
		hash := treehash.Sum(body)
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		if err := p.Resume(ctx, make([]byte, size), hash, []int{1, 2, 3}, patience); !errors.Is(err, errNobody) {
			t.Errorf("%d bytes that nobody has: %v", size, err)
		}
		if err := p.Resume(ctx, make([]byte, size), hash, []int{2, 3}, absentTime); !errors.Is(err, errSilent) {
			t.Errorf("%d bytes, nobody is there: %v", size, err)
		}
		o.shelf.put(body)
		got := make([]byte, size)
		if err := p.Resume(ctx, got, hash, []int{1, 2, 3}, patience); err != nil || !bytes.Equal(got, body) {
			t.Errorf("%d bytes that one has: %v", size, err)
		}
		cancel()
	}
}
