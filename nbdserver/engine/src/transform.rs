//! Transforms: what is done to bytes between the disk and the place they live at.
//!
//! AES-XTS with the sector number as tweak ("plain64"), as LUKS has it: IEEE 1619, a tweak per sector, the first 8 bytes
//! of it the number in little endian. The arithmetic is OpenSSL's.

use std::ops::Range;

use openssl::cipher::{Cipher, CipherRef};
use openssl::cipher_ctx::CipherCtx;
use openssl::error::ErrorStack;

use crate::vector::Vector;

/// One key and how it is used.
pub struct Transform {
    cipher: &'static CipherRef,
    key: Vec<u8>,
    sector_size: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Decrypt,
    Encrypt,
}

impl Transform {
    /// None if there is no such cipher, or none with a key of this length.
    pub fn new(name: &str, key: &[u8], sector_size: usize) -> Option<Transform> {
        let cipher = match (name, key.len()) {
            ("aes-xts-plain64", 32) => Cipher::aes_128_xts(),
            ("aes-xts-plain64", 64) => Cipher::aes_256_xts(),
            _ => return None,
        };
        let lawful = sector_size.is_power_of_two() && (512..=4096).contains(&sector_size);
        lawful.then(|| Transform {
            cipher,
            key: key.to_vec(),
            sector_size,
        })
    }

    /// Whether a range can be transformed by itself: it begins and ends at sectors.
    pub fn takes(&self, position: u64, length: usize) -> bool {
        (position | length as u64).is_multiple_of(self.sector_size as u64)
    }

    /// Make what was read from the place what the layer holds, in its memory.
    pub fn decrypt(
        &self,
        position: u64,
        vector: &Vector,
        range: Range<usize>,
    ) -> Result<(), ErrorStack> {
        self.run(Direction::Decrypt, position, vector, range)
    }

    /// Make what the layer holds what is to be written to the place, in its memory.
    pub fn encrypt(
        &self,
        position: u64,
        vector: &Vector,
        range: Range<usize>,
    ) -> Result<(), ErrorStack> {
        self.run(Direction::Encrypt, position, vector, range)
    }

    fn run(
        &self,
        direction: Direction,
        position: u64,
        vector: &Vector,
        range: Range<usize>,
    ) -> Result<(), ErrorStack> {
        assert!(
            self.takes(position, range.len()),
            "a transform of part of a sector"
        );
        let mut context = CipherCtx::new()?;
        match direction {
            Direction::Decrypt => context.decrypt_init(Some(self.cipher), Some(&self.key), None)?,
            Direction::Encrypt => context.encrypt_init(Some(self.cipher), Some(&self.key), None)?,
        }
        let mut sector = position / self.sector_size as u64;
        for (slot, part) in vector.parts(range) {
            // Slots are cut at pages, so that a sector never lies in two; a vector that Python cut otherwise would be
            // transformed by its layer.
            assert!(
                part.len().is_multiple_of(self.sector_size),
                "a sector in two slots"
            );
            for data in slot.slice_mut(part).chunks_exact_mut(self.sector_size) {
                let mut tweak = [0; 16];
                tweak[..8].copy_from_slice(&sector.to_le_bytes());
                match direction {
                    Direction::Decrypt => context.decrypt_init(None, None, Some(&tweak))?,
                    Direction::Encrypt => context.encrypt_init(None, None, Some(&tweak))?,
                }
                context.cipher_update_inplace(data, data.len())?;
                sector += 1;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::Pool;

    #[test]
    fn ieee_1619_vector_2() {
        // IEEE 1619-2007, annex B, vector 2: 32 bytes, data unit 0x3333333333.
        let mut key = vec![0x11; 16];
        key.extend([0x22; 16]);
        let context = CipherCtx::new().and_then(|mut context| {
            context.encrypt_init(Some(Cipher::aes_128_xts()), Some(&key), None)?;
            let mut tweak = [0; 16];
            tweak[..8].copy_from_slice(&0x33_3333_3333_u64.to_le_bytes());
            context.encrypt_init(None, None, Some(&tweak))?;
            let mut data = [0x44; 32];
            context.cipher_update_inplace(&mut data, 32)?;
            Ok(data)
        });
        assert_eq!(context.unwrap()[..4], [0xc4, 0x54, 0x18, 0x5e]);
    }

    #[test]
    fn each_sector_by_its_number_and_back() {
        let pool = Pool::new(4 << 20).unwrap();
        let vector = Vector::new(pool.allocate(8192).unwrap());
        let transform =
            Transform::new("aes-xts-plain64", &(0..64).collect::<Vec<u8>>(), 512).unwrap();
        vector.fill(0, &[7; 8192]);
        transform.encrypt(512 * 9, &vector, 0..8192).unwrap();
        let whole = vector.to_vec(0..8192);
        assert_ne!(whole[..512], whole[512..1024]);
        transform.decrypt(512 * 10, &vector, 512..1024).unwrap();
        assert_eq!(vector.to_vec(512..1024), [7; 512]);
        assert_eq!(vector.to_vec(0..512), whole[..512]);
    }

    #[test]
    fn what_there_is() {
        assert!(Transform::new("aes-xts-plain64", &[1; 48], 512).is_none());
        assert!(Transform::new("aes-cbc", &[1; 32], 512).is_none());
        assert!(Transform::new("aes-xts-plain64", &[1; 32], 1000).is_none());
    }
}
