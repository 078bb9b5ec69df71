package spirt

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/goccy/go-yaml"

	"github.com/spirt-ml/spirt/p2p"
)

// settings are what a peer was told when its folder was made, so that it can
// be started again without being told.
type settings struct {
	Listen   string   `yaml:"listen"`             // host:port
	Announce []string `yaml:"announce,omitempty"` // host:port that others are told beside those of this machine
	Data     string   `yaml:"data,omitempty"`     // of its own, idx:FOLDER
	Database string   `yaml:"database,omitempty"` // URL of one in another process, with its password
}

func (s settings) write(peer string) error {
	return writeYAML(filepath.Join(peer, settingsFile), "How this peer is started; `spirt peer` takes it from here.", s, 0o600)
}

// readSettings returns those of a peer's folder, none if it has none.
func readSettings(peer string) (settings, error) {
	path := filepath.Join(peer, settingsFile)
	b, err := readFile(path, maxJobFile)
	if errors.Is(err, os.ErrNotExist) {
		return settings{}, nil
	}
	if err != nil {
		return settings{}, err
	}
	var s settings
	if err := yaml.UnmarshalWithOptions(b, &s, yaml.Strict()); err != nil {
		return settings{}, fmt.Errorf("%s: %s", path, strings.TrimSpace(yaml.FormatError(err, false, true)))
	}
	return s, nil
}

// fixedPort gives an address with port 0 one that is free now, so that the
// peer is found there again when it is started again.
func fixedPort(listen string) (string, error) {
	host, port, err := net.SplitHostPort(listen)
	if err != nil {
		return "", fmt.Errorf("listen address %q: %w: take host:port, such as 0.0.0.0:7000", listen, err)
	}
	if port != "0" {
		return listen, nil
	}
	l, err := net.Listen("tcp", listen)
	if err != nil {
		return "", fmt.Errorf("listen address %q: %w", listen, err)
	}
	defer l.Close()
	return net.JoinHostPort(host, strconv.Itoa(l.Addr().(*net.TCPAddr).Port)), nil
}

// reachable returns the addresses, host:port, at which others may reach a peer
// that listens: those announced, then those of this machine. Loopback counts
// where there is nothing else.
func (s settings) reachable() ([]string, error) {
	out := slices.Clone(s.Announce)
	host, port, err := net.SplitHostPort(s.Listen)
	if err != nil {
		return nil, fmt.Errorf("listen address %q: %w", s.Listen, err)
	}
	ip, err := netip.ParseAddr(host)
	if host != "" && (err != nil || !ip.IsUnspecified()) {
		return append(out, s.Listen), nil
	}
	all, err := net.InterfaceAddrs()
	if err != nil {
		return nil, fmt.Errorf("listing the addresses of this machine: %w", err)
	}
	var four, six, loop []string
	for _, a := range all {
		n, ok := a.(*net.IPNet)
		if !ok {
			continue
		}
		at, ok := netip.AddrFromSlice(n.IP)
		at = at.Unmap()
		address := net.JoinHostPort(at.String(), port)
		switch {
		case !ok || at.IsLinkLocalUnicast():
		case at.IsLoopback():
			loop = append(loop, address)
		case at.Is4():
			four = append(four, address)
		case host == "" || ip.Is6():
			six = append(six, address)
		}
	}
	if out = append(append(out, four...), six...); len(out) == 0 {
		out = loop
	}
	return out[:min(len(out), maxReachable)], nil
}

// maxReachable bounds the addresses that one peer tells of itself.
const maxReachable = 8

// dialable turns host:port of a peer into addresses that name it.
func dialable(id p2p.PeerID, addresses []string) (out []string) {
	for _, a := range addresses {
		host, port, err := net.SplitHostPort(a)
		switch {
		case strings.HasPrefix(a, "/") && strings.Contains(a, "/p2p/"):
			out = append(out, a)
			continue
		case strings.HasPrefix(a, "/"):
			out = append(out, a+"/p2p/"+string(id))
			continue
		case err != nil:
			continue // from outside, and of no use
		}
		kind := "dns"
		if ip, err := netip.ParseAddr(host); err == nil {
			kind = "ip6"
			if ip = ip.Unmap(); ip.Is4() {
				kind = "ip4"
			}
			host = ip.WithZone("").String()
		}
		out = append(out, fmt.Sprintf("/%s/%s/tcp/%s/p2p/%s", kind, host, port, id))
	}
	return out
}

// addressBook is where members were last known to listen, by peer ID.
type addressBook map[p2p.PeerID][]string

const maxAddressBook = 1 << 20 // bytes

func readAddressBook(peer string) addressBook {
	b, err := readFile(filepath.Join(peer, addressesFile), maxAddressBook)
	book := addressBook{}
	if err != nil || yaml.Unmarshal(b, &book) != nil || book == nil {
		return addressBook{} // others tell again
	}
	return book
}

func (b addressBook) write(peer string) error {
	return writeYAML(filepath.Join(peer, addressesFile), "Where members were last known to listen.", b, 0o644)
}

// short turns multiaddresses into host:port where that says the same, and
// leaves loopback out where there is something else.
func short(addresses []string) (out []string) {
	var loop []string
	for _, a := range addresses {
		if f := strings.Split(a, "/"); len(f) >= 5 && f[3] == "tcp" {
			a = net.JoinHostPort(f[2], f[4])
		}
		if strings.HasPrefix(a, "127.") || strings.HasPrefix(a, "[::1]") {
			loop = append(loop, a)
		} else if !slices.Contains(out, a) {
			out = append(out, a)
		}
	}
	if len(out) == 0 {
		return loop
	}
	return out
}
