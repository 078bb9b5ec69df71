package p2p

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/peer"
)

// A PeerID is an Ed25519 public key in libp2p's text form, "12D3Koo...".
type PeerID string

// ID returns the name of the peer that holds the private half of public.
func ID(public ed25519.PublicKey) (PeerID, error) {
	id, err := libp2pID(public)
	if err != nil {
		return "", err
	}
	return PeerID(id.String()), nil
}

func libp2pID(public ed25519.PublicKey) (peer.ID, error) {
	key, err := crypto.UnmarshalEd25519PublicKey(public)
	if err != nil {
		return "", fmt.Errorf("an Ed25519 public key has %d bytes, not %d", ed25519.PublicKeySize, len(public))
	}
	return peer.IDFromPublicKey(key)
}

// PublicKey returns the key that the identity stands for.
func (id PeerID) PublicKey() (ed25519.PublicKey, error) {
	decoded, err := peer.Decode(string(id))
	if err != nil {
		return nil, fmt.Errorf("peer ID %q: %w", string(id), err)
	}
	key, err := decoded.ExtractPublicKey()
	if err != nil {
		return nil, fmt.Errorf("peer ID %q holds no Ed25519 key: %w", string(id), err)
	}
	if key.Type() != crypto.Ed25519 {
		return nil, fmt.Errorf("peer ID %q holds a %s key: only Ed25519 is used here", string(id), key.Type())
	}
	raw, err := key.Raw()
	if err != nil {
		return nil, fmt.Errorf("peer ID %q: %w", string(id), err)
	}
	return ed25519.PublicKey(raw), nil
}

// NewKey makes a new identity.
func NewKey() (ed25519.PrivateKey, error) {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	return key, err
}

const (
	keyBlock   = "PRIVATE KEY" // PKCS #8, as openssl writes it
	maxKeyFile = 4 << 10
)

// WriteKey stores key as PEM in a new file that only its owner may read. It
// never overwrites a file: a lost identity cannot be made again.
func WriteKey(path string, key ed25519.PrivateKey) (err error) {
	if len(key) != ed25519.PrivateKeySize {
		return fmt.Errorf("an Ed25519 private key has %d bytes, not %d", ed25519.PrivateKeySize, len(key))
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return fmt.Errorf("encoding a private key: %w", err)
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("writing a private key: %w", err)
	}
	defer func() {
		if cerr := f.Close(); err == nil {
			err = cerr
		}
		if err != nil {
			os.Remove(path) // ours: it was created above
			err = fmt.Errorf("writing private key %s: %w", path, err)
		}
	}()
	if err := pem.Encode(f, &pem.Block{Type: keyBlock, Bytes: der}); err != nil {
		return err
	}
	return f.Sync()
}

// LoadKey reads what WriteKey wrote. A file that others than its owner may
// read is refused: its key may be known to them.
func LoadKey(path string) (ed25519.PrivateKey, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("reading a private key: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("reading private key %s: %w", path, err)
	}
	if err := checkKeyMode(path, info.Mode()); err != nil {
		return nil, err
	}
	text, err := io.ReadAll(io.LimitReader(f, maxKeyFile+1))
	if err != nil {
		return nil, fmt.Errorf("reading private key %s: %w", path, err)
	}
	key, err := parseKey(text)
	if err != nil {
		return nil, fmt.Errorf("reading private key %s: %w", path, err)
	}
	return key, nil
}

func parseKey(text []byte) (ed25519.PrivateKey, error) {
	if len(text) > maxKeyFile {
		return nil, fmt.Errorf("more than %d bytes: not a private key", maxKeyFile)
	}
	block, _ := pem.Decode(text)
	if block == nil || block.Type != keyBlock {
		return nil, fmt.Errorf("no PEM block %q in it", keyBlock)
	}
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, err
	}
	key, ok := parsed.(ed25519.PrivateKey)
	if !ok {
		return nil, errors.New("it is not an Ed25519 key")
	}
	return key, nil
}
