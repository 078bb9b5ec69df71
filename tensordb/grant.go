package tensordb

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"
)

// Grant is what one invocation of a function may do with the database: read the tensors it names, and add the gradient of
// one minibatch to one sum. [Server.Sign] makes a token of it, which AUTH takes.
type Grant struct {
	Read       []string      // keys, for TENSOR.GET, TENSOR.ROWS, TENSOR.HASH and EXISTS; at most 8
	Accumulate string        // key of the sum; empty: none
	Minibatch  int           // the one that may be added there, once
	Life       time.Duration // how long connections may show the token; those that did go on
}

// signedGrant is what a token has of a Grant.
type signedGrant struct {
	Read       []string      `json:"r"`
	Accumulate string        `json:"a,omitempty"`
	Minibatch  int           `json:"m,omitempty"`
	Until      time.Duration `json:"u"` // since the server was made: no step of a clock matters
}

// grantMark starts a token that is a signed grant; no other secret may.
const grantMark = "grant."

// maxGrantKeys bounds the keys of a grant.
const maxGrantKeys = 8

// Sign returns the token that stands for g at this server, and at no other. It has at most 4 KiB.
func (s *Server) Sign(g Grant) (string, error) {
	if len(g.Read) > maxGrantKeys {
		return "", fmt.Errorf("signing a grant of %d keys: at most %d can be read", len(g.Read), maxGrantKeys)
	}
	body, err := json.Marshal(signedGrant{g.Read, g.Accumulate, g.Minibatch, time.Since(s.made) + g.Life})
	if err != nil {
		return "", fmt.Errorf("encoding a grant: %w", err)
	}
	text := grantMark + base64.RawURLEncoding.EncodeToString(body)
	token := text + "." + base64.RawURLEncoding.EncodeToString(s.mac(text))
	if len(token) > maxArg {
		return "", fmt.Errorf("a grant of %d bytes: tokens have at most %d: use shorter keys", len(token), maxArg)
	}
	return token, nil
}

func (s *Server) mac(text string) []byte {
	mac := hmac.New(sha256.New, s.key[:])
	mac.Write([]byte(text))
	return mac.Sum(nil)
}

// openGrant returns what a token grants, nil if this server did not sign it or its time is over.
func (s *Server) openGrant(token string) *signedGrant {
	at := strings.LastIndexByte(token, '.')
	if !strings.HasPrefix(token, grantMark) || at < len(grantMark) {
		return nil
	}
	text := token[:at]
	sum, err := base64.RawURLEncoding.Strict().DecodeString(token[at+1:])
	if err != nil || !hmac.Equal(sum, s.mac(text)) {
		return nil
	}
	body, err := base64.RawURLEncoding.DecodeString(text[len(grantMark):])
	if err != nil {
		return nil
	}
	var g signedGrant
	if json.Unmarshal(body, &g) != nil || time.Since(s.made) > g.Until {
		return nil
	}
	return &g
}

// allows refuses a command of the given name, with its arguments, that the grant does not cover.
func (g *signedGrant) allows(name string, args [][]byte) error {
	switch name {
	case "AUTH", "HELLO", "QUIT", "PING":
		return nil
	case "TENSOR.GET", "TENSOR.ROWS", "TENSOR.HASH", "EXISTS":
		keys := args[1:2]
		if name == "EXISTS" {
			keys = args[1:]
		}
		for _, key := range keys {
			if !slices.Contains(g.Read, string(key)) {
				return refuse("NOPERM", "this token may not use key %.80q", key)
			}
		}
		return nil
	case "TENSOR.ACCUMULATE":
		if g.Accumulate == "" || string(args[1]) != g.Accumulate {
			return refuse("NOPERM", "this token may not use key %.80q", args[1])
		}
		if string(args[2]) != fmt.Sprint(g.Minibatch) {
			return refuse("NOPERM", "this token may not add minibatch %.20q", args[2])
		}
		return nil
	}
	return refuse("NOPERM", "this token may not use %s", name)
}
