package p2p

import (
	"context"
	"crypto/ed25519"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"time"

	"github.com/libp2p/go-libp2p/core/connmgr"
	"github.com/libp2p/go-libp2p/core/control"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/peerstore"
	ma "github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"
)

// A guest is whoever asks to join: it opens one stream, sends one request, and
// gets one answer. docs/p2p.md has the offsets.
const (
	joinProtocol = "/spirt/join/1"

	// MaxAsk and MaxAnswer bound a request to join and its answer, in bytes.
	MaxAsk    = 64 << 10
	MaxAnswer = 4 << 20

	maxRefusal       = 1 << 10 // bytes of the text that says why
	guestsAtOnce     = 8
	guestsPerAddress = 4                // IPv4 address or IPv6 /64
	guestTime        = 15 * time.Second // of one connection

	answerYes      = 0
	answerNo       = 1
	answerOtherJob = 2
)

// guest is one connection of someone who asks. Host.mu guards streams.
type guest struct {
	from    string // an address, as guestsPerAddress counts them
	at      time.Time
	streams int
	over    chan struct{} // closed when the connection is to be closed, or was
}

// guestAddress is what guestsPerAddress counts.
func guestAddress(a ma.Multiaddr) string {
	ip, err := manet.ToIP(a)
	if err != nil {
		return ""
	}
	addr, _ := netip.AddrFromSlice(ip)
	if addr = addr.Unmap(); addr.Is6() {
		prefix, _ := addr.WithZone("").Prefix(64) // cannot fail
		return prefix.String()
	}
	return addr.String()
}

// turnGuestLocked says why a stranger is not let in, "" if it is.
func (h *Host) turnGuestLocked(dir network.Direction, addr ma.Multiaddr) string {
	if h.cfg.Guests == nil || dir != network.DirInbound {
		return "it is not on the roster of this job"
	}
	from, same := guestAddress(addr), 0
	for _, g := range h.guests {
		if g.from == from {
			same++
		}
	}
	if len(h.guests) >= guestsAtOnce || same >= guestsPerAddress {
		h.counts.guestsRefused.Add(1)
		return "too many ask to join at once"
	}
	return ""
}

// welcomeLocked takes in a stranger's connection, and closes it when it was
// answered or its time is over.
func (h *Host) welcomeLocked(c network.Conn) {
	g := &guest{from: guestAddress(c.RemoteMultiaddr()), at: time.Now(), over: make(chan struct{})}
	if !h.spawnLocked(func() {
		ask, all := time.NewTimer(h.guestAskTime()), time.NewTimer(guestTime)
		defer ask.Stop()
		defer all.Stop()
		for wait := true; wait; {
			select {
			case <-g.over:
				wait = false
			case <-ask.C:
				h.mu.Lock()
				wait = g.streams > 0
				h.mu.Unlock()
			case <-all.C:
				wait = false
			case <-h.stop:
				wait = false
			}
		}
		h.mu.Lock()
		delete(h.guests, c)
		h.mu.Unlock()
		c.Close()
	}) {
		c.Close()
		return
	}
	h.guests[c] = g
}

// guestAskTime is from a connection to the whole request.
func (h *Host) guestAskTime() time.Duration {
	return min(guestTime, helloBeats*h.cfg.Heartbeat)
}

// guestLeft notes that a connection was closed.
func (h *Host) guestLeft(c network.Conn) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if g := h.guests[c]; g != nil {
		h.guestOverLocked(c, g)
	}
}

func (h *Host) guestOverLocked(c network.Conn, g *guest) {
	delete(h.guests, c)
	select {
	case <-g.over:
	default:
		close(g.over)
	}
}

// attend answers the stream that a guest opened, which must be its first and
// its last, and ends its connection.
func (h *Host) attend(ctx context.Context, g *guest, stream network.Stream) {
	c := stream.Conn()
	h.mu.Lock()
	g.streams++
	n := g.streams
	h.mu.Unlock()
	err := errors.New("a second stream of one that asks to join")
	if n == 1 {
		if err = stream.SetDeadline(g.at.Add(h.guestAskTime())); err == nil {
			if _, err = acceptHead(stream, joinProtocol); err == nil {
				err = h.answerGuest(ctx, g, stream)
			}
		}
	}
	h.guestDone(stream, err)
	h.mu.Lock()
	h.guestOverLocked(c, g)
	h.mu.Unlock()
}

// attendMember answers a member that asks to join: one that did not get the
// answer when it was a stranger.
func (h *Host) attendMember(ctx context.Context, stream network.Stream) {
	c := stream.Conn()
	g := &guest{from: guestAddress(c.RemoteMultiaddr()), at: time.Now(), over: make(chan struct{})}
	h.mu.Lock()
	ok := h.guests[c] == nil && h.turnGuestLocked(network.DirInbound, c.RemoteMultiaddr()) == ""
	if ok {
		h.guests[c] = g
	}
	h.mu.Unlock()
	if !ok {
		stream.Reset()
		return
	}
	h.guestDone(stream, h.answerGuest(ctx, g, stream))
	h.mu.Lock()
	h.guestOverLocked(c, g)
	h.mu.Unlock()
}

func (h *Host) guestDone(stream network.Stream, err error) {
	if err != nil {
		h.counts.guestsRefused.Add(1)
		c := stream.Conn()
		h.reportRefused(c.RemotePeer(), c.RemoteMultiaddr(), "it asked to join, but "+err.Error())
	}
	stream.Reset()
}

// answerGuest reads a request and answers it.
func (h *Host) answerGuest(ctx context.Context, g *guest, stream network.Stream) error {
	ctx, cancel := context.WithDeadline(ctx, g.at.Add(guestTime))
	defer cancel()
	if err := stream.SetDeadline(g.at.Add(h.guestAskTime())); err != nil {
		return err
	}
	request, job, err := readAsk(stream)
	if err != nil {
		return fmt.Errorf("its request is of no use: %w", err)
	}
	status, answer := byte(answerYes), []byte(nil)
	if job != h.cfg.Job {
		status, answer = answerOtherJob, nil
	} else if answer, err = h.cfg.Guests(ctx, PeerID(stream.Conn().RemotePeer().String()), request); err != nil {
		text := err.Error()
		status, answer = answerNo, []byte(strings.ToValidUTF8(text[:min(len(text), maxRefusal)], ""))
	} else if len(answer) > MaxAnswer {
		h.cfg.Logger.Error("p2p: the answer to a guest is too long", "bytes", len(answer), "most", MaxAnswer)
		status, answer = answerNo, []byte("the answer is too long")
	}
	if err := stream.SetDeadline(g.at.Add(guestTime)); err != nil {
		return err
	}
	if _, err := stream.Write(appendAnswer(status, answer)); err != nil {
		return fmt.Errorf("it does not take the answer: %w", err)
	}
	h.counts.guests.Add(1)
	_ = stream.CloseWrite() // the wait below ends either way
	// Closing the connection now could cut the answer off: the guest ends it.
	_, _ = io.CopyN(io.Discard, stream, 1)
	return nil
}

// appendAsk encodes a request to join.
func appendAsk(job [32]byte, request []byte) []byte {
	out := append(openerHead(joinProtocol), job[:]...)
	out = binary.LittleEndian.AppendUint32(out, uint32(len(request)))
	return append(out, request...)
}

// readAsk reads what appendAsk wrote, after its head.
func readAsk(r io.Reader) (request []byte, job [32]byte, err error) {
	var head [32 + 4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, job, err
	}
	copy(job[:], head[:])
	n := binary.LittleEndian.Uint32(head[32:])
	if n > MaxAsk {
		return nil, job, fmt.Errorf("%d bytes: at most %d", n, MaxAsk)
	}
	request = make([]byte, n)
	_, err = io.ReadFull(r, request)
	return request, job, err
}

func appendAnswer(status byte, answer []byte) []byte {
	out := binary.LittleEndian.AppendUint32([]byte{status}, uint32(len(answer)))
	return append(out, answer...)
}

// errRefused is an answer that says no.
type errRefused struct{ text string }

func (e errRefused) Error() string { return e.text }

// readAnswer reads what appendAnswer wrote.
func readAnswer(r io.Reader) ([]byte, error) {
	var head [5]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, fmt.Errorf("it did not answer: %w", err)
	}
	n, most := binary.LittleEndian.Uint32(head[1:]), uint32(MaxAnswer)
	if head[0] != answerYes {
		most = maxRefusal
	}
	if n > most {
		return nil, fmt.Errorf("an answer of %d bytes: at most %d", n, most)
	}
	// Grows as it comes: who answers is not known to be honest.
	answer, err := io.ReadAll(io.LimitReader(r, int64(n)))
	if err == nil && len(answer) < int(n) {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return nil, fmt.Errorf("reading its answer: %w", err)
	}
	switch head[0] {
	case answerYes:
		return answer, nil
	case answerNo:
		return nil, errRefused{fmt.Sprintf("it refused: %q", answer)}
	case answerOtherJob:
		return nil, errRefused{"it works on another job"}
	}
	return nil, fmt.Errorf("an answer of unknown kind %d", head[0])
}

// Ask sends a request to join to a host that has [Config.Guests], and returns
// its answer. Key is the identity that asks. Each address must name the
// identity of its peer at the end (/p2p/12D3...), since who answers is only
// known by it; the peers are asked one after the other, in the order of their
// first addresses, until one says yes. Without a deadline of ctx each gets 20 s.
func Ask(ctx context.Context, key ed25519.PrivateKey, addrs []string, job [32]byte, request []byte) ([]byte, error) {
	const maxAddresses = 64
	if len(key) != ed25519.PrivateKeySize {
		return nil, fmt.Errorf("p2p: asking to join: an Ed25519 private key has %d bytes, not %d", ed25519.PrivateKeySize, len(key))
	}
	if len(request) > MaxAsk {
		return nil, fmt.Errorf("p2p: asking to join: a request of %d bytes: at most %d", len(request), MaxAsk)
	}
	if len(addrs) == 0 || len(addrs) > maxAddresses {
		return nil, fmt.Errorf("p2p: asking to join at %d addresses: want 1 to %d", len(addrs), maxAddresses)
	}
	var order []peer.ID
	at := make(map[peer.ID][]ma.Multiaddr)
	for _, s := range addrs {
		addr, id, err := parseAddress(s)
		if err == nil && id == "" {
			err = fmt.Errorf("address %q does not name its peer: it ends in /p2p/ and the peer's ID", s)
		}
		if err != nil {
			return nil, fmt.Errorf("p2p: asking to join: %w", err)
		}
		if at[id] == nil {
			order = append(order, id)
		}
		at[id] = append(at[id], addr)
	}
	limits, err := Limits{}.withDefaults(1)
	if err != nil {
		return nil, fmt.Errorf("p2p: asking to join: %w", err)
	}
	n, err := newFabric(key, 1, limits, askGate{})
	if err != nil {
		return nil, fmt.Errorf("p2p: asking to join: %w", err)
	}
	defer n.close()
	var errs []error
	for _, id := range order {
		answer, err := n.ask(ctx, id, at[id], appendAsk(job, request))
		if err == nil {
			return answer, nil
		}
		errs = append(errs, fmt.Errorf("p2p: asking %s to join: %w", id, err))
		if ctx.Err() != nil {
			break
		}
	}
	return nil, errors.Join(errs...)
}

func (n *fabric) ask(ctx context.Context, id peer.ID, addrs []ma.Multiaddr, request []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTime+guestTime)
	defer cancel()
	n.swarm.Peerstore().AddAddrs(id, addrs, peerstore.PermanentAddrTTL)
	c, err := n.swarm.DialPeer(ctx, id)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	stream, err := c.NewStream(ctx)
	if err != nil {
		return nil, fmt.Errorf("opening a stream: it takes no guests, or too many at once: %w", err)
	}
	defer stream.Close()
	defer context.AfterFunc(ctx, func() { stream.SetDeadline(time.Unix(1, 0)) })()
	if _, err := stream.Write(request); err != nil {
		return nil, fmt.Errorf("sending the request: %w", err)
	}
	if err := readHead(stream, joinProtocol); err != nil {
		return nil, fmt.Errorf("it takes no guests, or too many at once: %w", err)
	}
	return readAnswer(stream)
}

// askGate lets the asking side dial. It listens nowhere.
type askGate struct{ connmgr.ConnectionGater }

func (askGate) InterceptPeerDial(peer.ID) bool               { return true }
func (askGate) InterceptAddrDial(peer.ID, ma.Multiaddr) bool { return true }
func (askGate) InterceptAccept(network.ConnMultiaddrs) bool  { return false }
func (askGate) InterceptSecured(network.Direction, peer.ID, network.ConnMultiaddrs) bool {
	return true
}
func (askGate) InterceptUpgraded(network.Conn) (bool, control.DisconnectReason) { return true, 0 }
