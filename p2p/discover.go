package p2p

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"

	manet "github.com/multiformats/go-multiaddr/net"
	"github.com/zeebo/blake3"
	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/net/ipv4"
)

// Discovery is multicast DNS with service discovery (RFC 6762, 6763) cut down
// to one service and its text records. docs/p2p.md has the details.
const (
	discoverPort   = 5353
	discoverTTL    = 120              // seconds that an announcement holds
	discoverFirst  = time.Second      // from the first question to the second; then it doubles
	discoverLast   = time.Minute      // at most
	discoverAnswer = time.Second      // at most one answer in this time
	discoverForget = 10 * time.Minute // an address is reported again after this time

	maxDatagram      = 9000 // bytes, as RFC 6762 bounds them
	maxAnnounced     = 8    // addresses in one announcement
	maxDiscovered    = 1024 // addresses remembered
	maxPerSource     = 16   // of them from one sender
	discoverRate     = 100  // datagrams read in a second
	discoverBurst    = 200
	discoverAddrText = "dnsaddr=" // as libp2p writes it
)

var discoverGroup = net.IPv4(224, 0, 0, 251)

// Discover announces a peer's addresses on the local network and reports those
// of others of the same job, until ctx ends; then it returns nil. An error says
// that this machine has no multicast. Addrs are as [Host.Addrs] gives them; with
// none it only looks. Each address ends with an identity, is its sender's own
// IPv4 address, and is reported once in ten minutes at most, one at a time, by a
// goroutine of Discover's.
//
// Anyone on the network may announce anything: an address found is to be dialled
// or asked, and the handshake says who is there. The network learns the peer's
// identity and that it takes part in some job, of which it sees a hash of 32
// bits.
func Discover(ctx context.Context, job [32]byte, addrs []string, found func(addr string)) error {
	conn, err := net.ListenUDP("udp4", &net.UDPAddr{IP: discoverGroup, Port: discoverPort}) // shares the port
	if err != nil {
		return fmt.Errorf("p2p: looking for peers on the local network: %w", err)
	}
	c := ipv4.NewPacketConn(conn)
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	if err := errors.Join(c.SetMulticastTTL(255), c.SetMulticastLoopback(true)); err != nil {
		return fmt.Errorf("p2p: looking for peers on the local network: %w", err)
	}
	d, err := newDiscovery(job, addrs)
	if err != nil {
		return fmt.Errorf("p2p: looking for peers on the local network: %w", err)
	}
	out := &multicast{conn: c, joined: make(map[int]bool)}
	if err := out.join(); err != nil {
		return fmt.Errorf("p2p: looking for peers on the local network: %w", err)
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	wg.Go(func() { d.speak(ctx, out) })
	buf := make([]byte, maxDatagram)
	for {
		n, _, from, err := c.ReadFrom(buf)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("p2p: looking for peers on the local network: %w", err)
		}
		if udp, ok := from.(*net.UDPAddr); ok {
			for _, a := range d.heard(buf[:n], udp.AddrPort().Addr().Unmap(), time.Now()) {
				found(a)
			}
		}
	}
}

// multicast sends to the group on all interfaces. Only one goroutine at a time
// uses it.
type multicast struct {
	conn   *ipv4.PacketConn
	joined map[int]bool // interfaces by index
}

// join joins the group on interfaces that are new, and fails if there is none.
func (m *multicast) join() error {
	all, err := net.Interfaces()
	if err != nil {
		return err
	}
	errs := []error{errors.New("no interface of this machine is up and has multicast")}
	now := make(map[int]bool)
	for _, i := range all {
		if i.Flags&net.FlagUp == 0 || i.Flags&net.FlagMulticast == 0 {
			continue
		}
		if !m.joined[i.Index] {
			if err := m.conn.JoinGroup(&i, &net.UDPAddr{IP: discoverGroup}); err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", i.Name, err))
				continue
			}
		}
		now[i.Index] = true
	}
	if m.joined = now; len(now) == 0 {
		return errors.Join(errs...)
	}
	return nil
}

func (m *multicast) send(b []byte) {
	for index := range m.joined {
		i := net.Interface{Index: index}
		if m.conn.SetMulticastInterface(&i) == nil {
			// What fails now is sent again later.
			_, _ = m.conn.WriteTo(b, nil, &net.UDPAddr{IP: discoverGroup, Port: discoverPort})
		}
	}
}

// discovery is what Discover knows, without its socket.
type discovery struct {
	service, instance dnsmessage.Name
	question          []byte
	answer            []byte        // nil: nothing to announce
	asked             chan struct{} // holds one token when someone asked
	own               map[string]bool
	read              bucket
	begin             time.Time
	seen              map[string]time.Time    // addresses, and when they may be reported again
	of                map[netip.Addr][]string // those of one sender
}

// serviceName is what peers of one job look for.
func serviceName(job [32]byte) string {
	h := blake3.Sum256(append([]byte("spirt/1 discover\x00"), job[:]...))
	return "_spirt-" + hex.EncodeToString(h[:4]) + "._tcp.local."
}

func newDiscovery(job [32]byte, addrs []string) (*discovery, error) {
	d := &discovery{
		asked: make(chan struct{}, 1), own: make(map[string]bool), begin: time.Now(),
		seen: make(map[string]time.Time), of: make(map[netip.Addr][]string),
	}
	var err error
	if d.service, err = dnsmessage.NewName(serviceName(job)); err != nil {
		return nil, err
	}
	if d.instance, err = dnsmessage.NewName(fmt.Sprintf("%016x.%s", rand.Uint64(), d.service)); err != nil {
		return nil, err
	}
	q := dnsmessage.Message{Questions: []dnsmessage.Question{{Name: d.service, Type: dnsmessage.TypePTR, Class: dnsmessage.ClassINET}}}
	if d.question, err = q.Pack(); err != nil {
		return nil, err
	}
	var text []string
	for _, a := range addrs {
		d.own[a] = true
		if addr, id, err := parseAddress(a); err != nil || id == "" {
			return nil, fmt.Errorf("address %q: want a multiaddress that ends with the peer's identity", a)
		} else if ip, err := manet.ToIP(addr); err != nil || ip.To4() == nil || ip.IsLoopback() {
			continue // nobody would believe it
		}
		if len(text) < maxAnnounced && len(discoverAddrText+a) <= 255 {
			text = append(text, discoverAddrText+a)
		}
	}
	if len(text) == 0 {
		return d, nil
	}
	header := func(name dnsmessage.Name) dnsmessage.ResourceHeader {
		return dnsmessage.ResourceHeader{Name: name, Class: dnsmessage.ClassINET, TTL: discoverTTL}
	}
	m := dnsmessage.Message{
		Header: dnsmessage.Header{Response: true, Authoritative: true},
		Answers: []dnsmessage.Resource{
			{Header: header(d.service), Body: &dnsmessage.PTRResource{PTR: d.instance}},
			{Header: header(d.instance), Body: &dnsmessage.TXTResource{TXT: text}},
		},
	}
	d.answer, err = m.Pack()
	return d, err
}

// speak asks for others at growing intervals, and answers those that ask.
func (d *discovery) speak(ctx context.Context, out *multicast) {
	interval := discoverFirst
	ask, answer := time.NewTimer(0), time.NewTimer(0)
	defer ask.Stop()
	defer answer.Stop()
	if d.answer == nil {
		answer.Stop()
	}
	last := time.Time{}
	for {
		select {
		case <-ctx.Done():
			return
		case <-ask.C:
			_ = out.join() // an interface may come back later
			out.send(d.question)
			ask.Reset(interval + rand.N(interval/4))
			interval = min(discoverLast, 2*interval)
		case <-d.asked:
			// All that are asked answer: not at the same moment.
			if d.answer != nil {
				answer.Reset(max(20*time.Millisecond+rand.N(100*time.Millisecond), discoverAnswer-time.Since(last)))
			}
		case <-answer.C:
			last = time.Now()
			out.send(d.answer)
		}
	}
}

// heard reads one datagram and returns the addresses in it that are new.
func (d *discovery) heard(b []byte, from netip.Addr, now time.Time) []string {
	if !d.read.take(now.Sub(d.begin), 1, discoverRate, discoverBurst) {
		return nil
	}
	addrs, question := d.parse(b, from)
	if question {
		select {
		case d.asked <- struct{}{}:
		default:
		}
	}
	var out []string
	for _, a := range addrs {
		if d.own[a] || now.Before(d.seen[a]) {
			continue
		}
		if d.seen[a].IsZero() && (len(d.seen) >= maxDiscovered || len(d.of[from]) >= maxPerSource) {
			d.forget(now)
			if len(d.seen) >= maxDiscovered || len(d.of[from]) >= maxPerSource {
				continue
			}
		}
		if d.seen[a].IsZero() {
			d.of[from] = append(d.of[from], a)
		}
		d.seen[a] = now.Add(discoverForget)
		out = append(out, a)
	}
	return out
}

// forget drops what may be reported again.
func (d *discovery) forget(now time.Time) {
	for from, list := range d.of {
		kept := list[:0]
		for _, a := range list {
			if now.Before(d.seen[a]) {
				kept = append(kept, a)
			} else {
				delete(d.seen, a)
			}
		}
		if d.of[from] = kept; len(kept) == 0 {
			delete(d.of, from)
		}
	}
}

// parse returns the addresses that a datagram announces for this service, and
// whether it asks for them. An address counts only if it is the sender's own:
// nobody is made to dial a third party.
func (d *discovery) parse(b []byte, from netip.Addr) (addrs []string, question bool) {
	var p dnsmessage.Parser
	head, err := p.Start(b)
	if err != nil {
		return nil, false
	}
	if !head.Response {
		for range maxAnnounced {
			q, err := p.Question()
			if err != nil {
				break
			}
			question = question || q.Type == dnsmessage.TypePTR && strings.EqualFold(q.Name.String(), d.service.String())
		}
		return nil, question
	}
	if p.SkipAllQuestions() != nil {
		return nil, false
	}
	for range 4 * maxAnnounced { // records
		h, err := p.AnswerHeader()
		if err != nil {
			break
		}
		if h.Type != dnsmessage.TypeTXT || !strings.HasSuffix(strings.ToLower(h.Name.String()), "."+d.service.String()) {
			if p.SkipAnswer() != nil {
				break
			}
			continue
		}
		txt, err := p.TXTResource()
		if err != nil {
			break
		}
		for _, s := range txt.TXT[:min(len(txt.TXT), maxAnnounced)] {
			s, ok := strings.CutPrefix(s, discoverAddrText)
			if !ok || len(addrs) == maxAnnounced {
				continue
			}
			addr, id, err := parseAddress(s)
			if err != nil || id == "" {
				continue
			}
			if ip, err := manet.ToIP(addr); err == nil {
				if x, _ := netip.AddrFromSlice(ip); x.Unmap() == from {
					addrs = append(addrs, fmt.Sprintf("%s/p2p/%s", addr, id))
				}
			}
		}
	}
	return addrs, false
}
