package p2p

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"syscall"

	"github.com/libp2p/go-libp2p/core/peer"
	ma "github.com/multiformats/go-multiaddr"
)

// parseAddress reads a multiaddress ("/ip4/127.0.0.1/tcp/4001/p2p/12D3...") or
// "host:port". It returns the transport part and the identity named at its
// end, "" if there is none.
func parseAddress(s string) (ma.Multiaddr, peer.ID, error) {
	const maxAddress = 512 // bytes; a DNS name has at most 253
	if len(s) > maxAddress {
		return nil, "", fmt.Errorf("an address of %d bytes: at most %d", len(s), maxAddress)
	}
	if !strings.HasPrefix(s, "/") {
		addr, err := fromHostPort(s)
		return addr, "", err
	}
	full, err := ma.NewMultiaddr(s)
	if err != nil {
		return nil, "", fmt.Errorf("address %q: %w", s, err)
	}
	addr, id := peer.SplitAddr(full)
	if addr == nil {
		return nil, "", fmt.Errorf("address %q names no host and port", s)
	}
	if p := addr.Protocols(); len(p) != 2 || p[1].Code != ma.P_TCP {
		return nil, "", fmt.Errorf("address %q: want /ip4, /ip6 or /dns and then /tcp, and nothing else", s)
	}
	return addr, id, nil
}

func fromHostPort(s string) (ma.Multiaddr, error) {
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		return nil, fmt.Errorf("address %q: %w: write host:port or a multiaddress", s, err)
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return nil, fmt.Errorf("address %q: port %q is not a number from 0 to 65535", s, port)
	}
	kind := "dns"
	if host == "" {
		host = "0.0.0.0"
	}
	if ip, err := netip.ParseAddr(host); err == nil {
		kind = "ip6"
		if ip.Unmap().Is4() {
			ip, kind = ip.Unmap(), "ip4"
		}
		host = ip.WithZone("").String()
	}
	addr, err := ma.NewMultiaddr(fmt.Sprintf("/%s/%s/tcp/%d", kind, host, n))
	if err != nil {
		return nil, fmt.Errorf("address %q: %w", s, err)
	}
	return addr, nil
}

// listenError says what a failed listen means and how to mend it.
func listenError(addr string, err error) error {
	const wsaAddrInUse = syscall.Errno(10048) // Windows' number for EADDRINUSE
	var errno syscall.Errno
	switch errors.As(err, &errno); {
	case errors.Is(err, syscall.EADDRINUSE) || errno == wsaAddrInUse:
		return fmt.Errorf("listening on %s: the port is taken by another process: stop that one, name another port, or use port 0 for any free one: %w", addr, err)
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return fmt.Errorf("listening on %s: this machine has no such address: use one of its own, or 0.0.0.0 for all of them: %w", addr, err)
	case errors.Is(err, syscall.EACCES):
		return fmt.Errorf("listening on %s: not allowed: use a port above 1023: %w", addr, err)
	}
	return fmt.Errorf("listening on %s: %w", addr, err)
}
