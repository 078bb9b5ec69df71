package p2p

import (
	"crypto/ed25519"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"time"

	"github.com/libp2p/go-libp2p/core/connmgr"
	"github.com/libp2p/go-libp2p/core/control"
	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/sec"
	"github.com/libp2p/go-libp2p/gologshim"
	"github.com/libp2p/go-libp2p/p2p/host/eventbus"
	"github.com/libp2p/go-libp2p/p2p/host/peerstore/pstoremem"
	rcmgr "github.com/libp2p/go-libp2p/p2p/host/resource-manager"
	"github.com/libp2p/go-libp2p/p2p/muxer/yamux"
	"github.com/libp2p/go-libp2p/p2p/net/swarm"
	"github.com/libp2p/go-libp2p/p2p/net/upgrader"
	"github.com/libp2p/go-libp2p/p2p/security/noise"
	"github.com/libp2p/go-libp2p/p2p/transport/tcp"
	"github.com/libp2p/go-libp2p/x/rate"
	ma "github.com/multiformats/go-multiaddr"
)

// fabric is libp2p's swarm with TCP, Noise and yamux, put together by hand:
// libp2p's own host would add QUIC, WebRTC, relays, identify and their memory.
type fabric struct {
	swarm *swarm.Swarm
	peers io.Closer
}

func newFabric(key ed25519.PrivateKey, members int, limits Limits, gate connmgr.ConnectionGater) (_ *fabric, err error) {
	private, err := crypto.UnmarshalEd25519PrivateKey(key)
	if err != nil {
		return nil, err
	}
	id, err := peer.IDFromPrivateKey(private)
	if err != nil {
		return nil, err
	}
	peers, err := pstoremem.NewPeerstore()
	if err != nil {
		return nil, err
	}
	n := &fabric{peers: peers}
	defer func() {
		if err != nil {
			n.close()
		}
	}()
	if err := errors.Join(peers.AddPrivKey(id, private), peers.AddPubKey(id, private.GetPublic())); err != nil {
		return nil, err
	}
	resources, err := newResources(members, limits)
	if err != nil {
		return nil, err
	}
	n.swarm, err = swarm.NewSwarm(id, peers, eventbus.NewBus(),
		swarm.WithConnectionGater(gate), swarm.WithResourceManager(resources),
		swarm.WithDialTimeout(dialTime), swarm.WithDialTimeoutLocal(dialTime),
		swarm.WithUDPBlackHoleSuccessCounter(nil), swarm.WithIPv6BlackHoleSuccessCounter(nil))
	if err != nil {
		resources.Close()
		return nil, err
	}
	mux := upgrader.StreamMuxer{ID: yamux.ID, Muxer: newMuxer()}
	secure, err := noise.New(noise.ID, private, []upgrader.StreamMuxer{mux})
	if err != nil {
		return nil, err
	}
	up, err := upgrader.New([]sec.SecureTransport{secure}, []upgrader.StreamMuxer{mux}, nil, resources, gate)
	if err != nil {
		return nil, err
	}
	// Without DisableReuseport two peers could listen on one port, each getting
	// some of the connections.
	transport, err := tcp.NewTCPTransport(up, resources, nil, tcp.DisableReuseport())
	if err != nil {
		return nil, err
	}
	return n, n.swarm.AddTransport(transport)
}

// LogLibrary sends what libp2p itself logs to handler instead of to standard
// error. It holds for the whole process and must be called before the first
// New.
func LogLibrary(handler slog.Handler) { gologshim.SetDefaultHandler(handler) }

func newMuxer() *yamux.Transport {
	c := *yamux.DefaultTransport
	// One frame, header included, then fits one Noise message of at most 65,519
	// bytes; with yamux's 64 KiB each would be followed by one of 17 bytes.
	c.MaxMessageSize = noise.MaxPlaintextLength
	c.AcceptBacklog = 64
	return &c
}

// newResources bounds connections, streams and window memory by the roster's
// size. A member has one connection, for a moment two; the rest is for
// handshakes of whoever calls.
func newResources(members int, l Limits) (network.ResourceManager, error) {
	conns := 4*members + 32
	streams := 2*l.BodyStreams + 4
	limits := rcmgr.PartialLimitConfig{
		System: rcmgr.ResourceLimits{
			Conns: rcmgr.LimitVal(conns), ConnsInbound: rcmgr.LimitVal(conns), ConnsOutbound: rcmgr.LimitVal(conns),
			FD:      rcmgr.LimitVal(conns),
			Streams: rcmgr.LimitVal(streams * members), StreamsInbound: rcmgr.LimitVal(streams * members),
			StreamsOutbound: rcmgr.LimitVal(streams * members),
			Memory:          64<<20 + 32<<20*rcmgr.LimitVal64(min(members, 64)),
		},
		// Connections before the handshake is done, and streams before their
		// protocol is known.
		Transient: rcmgr.ResourceLimits{
			Conns: rcmgr.LimitVal(members + 32), ConnsInbound: rcmgr.LimitVal(members + 32), ConnsOutbound: rcmgr.LimitVal(members + 32),
			FD:      rcmgr.LimitVal(members + 32),
			Streams: rcmgr.LimitVal(streams * members), StreamsInbound: rcmgr.LimitVal(streams * members),
			StreamsOutbound: rcmgr.LimitVal(streams * members),
			Memory:          64<<20 + 16<<20*rcmgr.LimitVal64(min(members, 64)),
		},
		PeerDefault: rcmgr.ResourceLimits{
			Conns: 8, ConnsInbound: 4, ConnsOutbound: 4, FD: 8,
			Streams: rcmgr.LimitVal(2 * streams), StreamsInbound: rcmgr.LimitVal(l.BodyStreams + 2),
			StreamsOutbound: rcmgr.LimitVal(2 * streams), Memory: 128 << 20,
		},
		Stream: rcmgr.ResourceLimits{Memory: 48 << 20},
	}.Build(rcmgr.InfiniteLimits)
	// Members may all share one address (a machine, a lab behind NAT).
	perIP := []rcmgr.ConnLimitPerSubnet{{PrefixLength: 32, ConnCount: conns}}
	perIP6 := []rcmgr.ConnLimitPerSubnet{{PrefixLength: 56, ConnCount: conns}}
	pace := rate.Limit{RPS: float64(members + 4), Burst: 4*members + 32}
	return rcmgr.NewResourceManager(rcmgr.NewFixedLimiter(limits), rcmgr.WithMetricsDisabled(),
		rcmgr.WithLimitPerSubnet(perIP, perIP6),
		rcmgr.WithConnRateLimiters(&rate.Limiter{SubnetRateLimiter: rate.SubnetLimiter{
			IPv4SubnetLimits: []rate.SubnetLimit{{PrefixLength: 32, Limit: pace}},
			IPv6SubnetLimits: []rate.SubnetLimit{{PrefixLength: 56, Limit: pace}},
			GracePeriod:      time.Minute,
		}}))
}

func (n *fabric) listen(s string) error {
	addr, id, err := parseAddress(s)
	if err != nil {
		return fmt.Errorf("listening: %w", err)
	}
	if id != "" {
		return fmt.Errorf("listening on %s: leave the identity out of it", s)
	}
	if err := n.swarm.AddListenAddr(addr); err != nil {
		return listenError(s, err)
	}
	return nil
}

// close waits for the swarm's goroutines.
func (n *fabric) close() error {
	var err error
	if n.swarm != nil {
		err = errors.Join(n.swarm.Close(), n.swarm.ResourceManager().Close())
	}
	return errors.Join(err, n.peers.Close())
}

// libp2p's names for the moments at which a connection can be refused.

func (g gater) InterceptPeerDial(id peer.ID) bool {
	g.h.mu.Lock()
	defer g.h.mu.Unlock()
	m := g.h.roster.of[id]
	return m != nil && m != g.h.self
}

func (g gater) InterceptAddrDial(peer.ID, ma.Multiaddr) bool { return true }

func (g gater) InterceptAccept(network.ConnMultiaddrs) bool { return true }

func (g gater) InterceptSecured(dir network.Direction, id peer.ID, c network.ConnMultiaddrs) bool {
	return g.admit(dir, id, c.RemoteMultiaddr())
}

func (g gater) InterceptUpgraded(network.Conn) (bool, control.DisconnectReason) { return true, 0 }
