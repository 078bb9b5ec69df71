package p2p

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

const someID = "12D3KooWHuujKGhuC6Y9NYvi5wC6xnu5WFA9NuCbZbM7MMxVFYMw"

func mustDiscovery(t testing.TB, job byte, addrs ...string) *discovery {
	t.Helper()
	d, err := newDiscovery([32]byte{job}, addrs)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// announcement packs text records as a peer of that job might.
func announcement(t testing.TB, job byte, text ...string) []byte {
	t.Helper()
	name := dnsmessage.MustNewName("x." + serviceName([32]byte{job}))
	m := dnsmessage.Message{
		Header:  dnsmessage.Header{Response: true},
		Answers: []dnsmessage.Resource{{Header: dnsmessage.ResourceHeader{Name: name, Class: dnsmessage.ClassINET}, Body: &dnsmessage.TXTResource{TXT: text}}},
	}
	b, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestDiscovery(t *testing.T) {
	from, other := netip.MustParseAddr("192.0.2.7"), netip.MustParseAddr("192.0.2.8")
	mine := "/ip4/192.0.2.7/tcp/4001/p2p/" + someID
	a := mustDiscovery(t, 1, mine, "/ip4/127.0.0.1/tcp/4001/p2p/"+someID, "/ip6/fd00::2/tcp/4001/p2p/"+someID)
	b, elsewhere := mustDiscovery(t, 1), mustDiscovery(t, 2)
	now := time.Now()
	if b.answer != nil {
		t.Error("a peer without addresses announces something")
	}
	// A question wakes those of the same job only.
	for _, d := range []*discovery{a, elsewhere} {
		if got := d.heard(b.question, other, now); got != nil {
			t.Errorf("a question has addresses: %q", got)
		}
	}
	if len(a.asked) != 1 || len(elsewhere.asked) != 0 {
		t.Errorf("asked: %d of the job, %d of another", len(a.asked), len(elsewhere.asked))
	}
	// The answer names the address of its sender, once in ten minutes.
	if got := b.heard(a.answer, from, now); !slices.Equal(got, []string{mine}) {
		t.Errorf("found %q", got)
	}
	if got := b.heard(a.answer, from, now.Add(discoverForget-1)); got != nil {
		t.Errorf("found again: %q", got)
	}
	if got := b.heard(a.answer, from, now.Add(discoverForget)); len(got) != 1 {
		t.Errorf("found %q after ten minutes", got)
	}
	if got := append(elsewhere.heard(a.answer, from, now), a.heard(a.answer, from, now)...); got != nil {
		t.Errorf("another job, or the peer itself, found %q", got)
	}
	for _, x := range []string{"127.0.0.1:1", "x", "/ip4/1.2.3.4/tcp/5"} {
		if _, err := newDiscovery([32]byte{}, []string{x}); err == nil || !strings.Contains(err.Error(), "ends with the peer's identity") {
			t.Errorf("announcing %q: %v", x, err)
		}
	}
}

// TestDiscoveryBelievesNobody: only a sender's own addresses count, and only so
// many.
func TestDiscoveryBelievesNobody(t *testing.T) {
	from := netip.MustParseAddr("192.0.2.7")
	now := time.Now()
	d := mustDiscovery(t, 1)
	for _, s := range []string{
		"", "dnsaddr=", discoverAddrText + "/ip4/192.0.2.7/tcp/1", // no identity
		discoverAddrText + "/ip4/192.0.2.8/tcp/1/p2p/" + someID, // somebody else's
		discoverAddrText + "/dns4/victim.example/tcp/1/p2p/" + someID,
		discoverAddrText + "192.0.2.7:1",
		"/ip4/192.0.2.7/tcp/1/p2p/" + someID,
	} {
		if got := d.heard(announcement(t, 1, s), from, now); got != nil {
			t.Errorf("%q: found %q", s, got)
		}
	}
	var many []string
	for port := range 20 {
		many = append(many, fmt.Sprintf("%s/ip4/192.0.2.7/tcp/%d/p2p/%s", discoverAddrText, port+1, someID))
	}
	if got := d.heard(announcement(t, 1, many...), from, now); len(got) != maxAnnounced {
		t.Errorf("%d addresses of one announcement", len(got))
	}
	d.heard(announcement(t, 1, many[8:]...), from, now)
	if got := d.heard(announcement(t, 1, many[16:]...), from, now); got != nil {
		t.Errorf("%d addresses of one sender, and %q", maxPerSource, got)
	}
	// Without end, from everywhere: remembered is so much, and read is so fast.
	found := 0
	for i := range 3 * maxDiscovered {
		from := netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)})
		found += len(d.heard(announcement(t, 1, fmt.Sprintf("%s/ip4/%s/tcp/1/p2p/%s", discoverAddrText, from, someID)), from, now.Add(time.Duration(i)*time.Second/discoverRate)))
	}
	if found != maxDiscovered-maxPerSource || len(d.seen) != maxDiscovered {
		t.Errorf("%d found, %d remembered", found, len(d.seen))
	}
	later := now.Add(2 * discoverForget)
	d.forget(later)
	if len(d.seen) != 0 || len(d.of) != 0 {
		t.Errorf("%d remembered after all were forgotten", len(d.seen))
	}
	read := 0
	for range 2 * discoverBurst {
		if b := announcement(t, 1, fmt.Sprintf("%s/ip4/192.0.2.9/tcp/%d/p2p/%s", discoverAddrText, read+1, someID)); len(d.heard(b, netip.MustParseAddr("192.0.2.9"), later)) == 1 {
			read++
		}
	}
	if read != maxPerSource {
		t.Errorf("%d found of one sender", read)
	}
	if got := d.heard(announcement(t, 1, discoverAddrText+"/ip4/192.0.2.10/tcp/1/p2p/"+someID), netip.MustParseAddr("192.0.2.10"), later); got != nil {
		t.Error("more datagrams are read than the rate allows")
	}
}

func TestDiscoverEndsWithItsContext(t *testing.T) {
	checkGoroutines(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := Discover(ctx, [32]byte{1}, nil, func(string) {}); err != nil && !strings.Contains(err.Error(), "looking for peers on the local network") {
		t.Error(err)
	}
}

func FuzzDiscovery(f *testing.F) {
	d := mustDiscovery(f, 1, "/ip4/192.0.2.7/tcp/4001/p2p/"+someID)
	f.Add(d.question)
	f.Add(d.answer)
	f.Add(announcement(f, 1, "", "dnsaddr=/", strings.Repeat("x", 255)))
	f.Add([]byte{})
	from := netip.MustParseAddr("192.0.2.7")
	f.Fuzz(func(t *testing.T, b []byte) {
		addrs, _ := d.parse(b, from)
		if len(addrs) > maxAnnounced {
			t.Fatalf("%d addresses", len(addrs))
		}
		for _, a := range addrs {
			if _, id, err := parseAddress(a); err != nil || id == "" || !strings.HasPrefix(a, "/ip4/192.0.2.7/tcp/") && !strings.HasPrefix(a, "/ip6/::ffff:192.0.2.7/tcp/") && !strings.HasPrefix(a, "/ip6/::ffff:c000:207/tcp/") {
				t.Fatalf("%q: %v", a, err)
			}
		}
	})
}
